package imagecontent

import (
	"errors"
	"fmt"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	content "atoll.dev/atoll/api/content/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/library"
)

// content sends an image, converted if that is asked for. What has been converted is not kept.
func (h *handler) content(w http.ResponseWriter, r *http.Request, item *api.ContentLibraryItem) {
	format, disk := r.URL.Query().Get(content.FormatParameter), -1
	if text := r.URL.Query().Get(content.DiskParameter); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			h.fail(w, r, apierrors.NewBadRequest(fmt.Sprintf("disk %q must be the number of a disk, from 0", text)))
			return
		}
		disk = n
	}
	if !item.Status.Ready {
		h.fail(w, r, apierrors.NewConflict(gv().WithResource(content.Items).GroupResource(), item.Name, errors.New("the item is not ready yet")))
		return
	}
	dir, err := h.library.Scratch()
	if err != nil {
		h.fail(w, r, apierrors.NewInternalError(err))
		return
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "export")
	select {
	case h.exporting <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	err = h.library.Export(r.Context(), string(item.UID), library.ExportOptions{Format: format, Disk: disk, Name: item.Status.Name}, path, nil)
	<-h.exporting
	switch {
	case err == nil:
	case errors.Is(err, convert.ErrFormat):
		h.fail(w, r, apierrors.NewBadRequest(err.Error()))
		return
	case errors.Is(err, library.ErrNotFound):
		h.fail(w, r, apierrors.NewServiceUnavailable(fmt.Sprintf("the content of item %s is on node %s: %v", item.Name, item.Status.Host, err)))
		return
	default:
		h.log.Warn("exporting an image", "item", item.Name, "error", err)
		h.fail(w, r, apierrors.NewInternalError(err))
		return
	}
	f, err := os.Open(path)
	if err != nil {
		h.fail(w, r, apierrors.NewInternalError(err))
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": library.ExportName(item.Status.Name, format)}))
	http.ServeContent(w, r, "", time.Time{}, f)
}
