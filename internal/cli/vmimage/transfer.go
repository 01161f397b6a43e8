package vmimage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/rest"

	content "atoll.dev/atoll/api/content/v1alpha1"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/storage/library"
)

// chunk is how much of a file is sent with one request: what is lost at most when a connection breaks is on its way.
const chunk = 64 << 20

// attempts to send a chunk.
const attempts = 5

// send sends a file, going on where an earlier call has ended.
func (c Config) send(ctx context.Context, cl *client, item Item, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("opening the image: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("opening the image: %w", err)
	}
	bar := c.bar("sending")
	defer bar.end()
	if l := c.Library(); l != nil {
		return sendLocal(ctx, l, item, f, info.Size(), bar)
	}
	web, base, err := cl.http()
	if err != nil {
		return err
	}
	base.Path += content.Path(item.Namespace, item.Name, content.Upload)
	u := upload{client: web, url: base.String(), file: f, total: info.Size(), bar: bar}
	return u.run(ctx)
}

// sendLocal puts a file into the library of this host.
func sendLocal(ctx context.Context, l *library.Library, item Item, f *os.File, total int64, bar *bar) error {
	id := string(item.UID)
	done, known, err := l.Received(id)
	if err != nil {
		return err
	}
	if known != total {
		done = 0
	}
	if done == total {
		return nil
	}
	if _, err := f.Seek(done, io.SeekStart); err != nil {
		return fmt.Errorf("reading the image: %w", err)
	}
	body := &watched{Reader: f, n: done, total: total, bar: bar}
	if _, err := l.Receive(ctx, id, filepath.Base(f.Name()), done, total, body); err != nil {
		return fmt.Errorf("sending the image: %w; the same command goes on with it", err)
	}
	return nil
}

// watched shows what is read of it.
type watched struct {
	io.Reader
	n, total int64
	bar      *bar
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	w.n += int64(n)
	w.bar.show(w.n, w.total)
	return n, err
}

// http is a client of the API server without a timeout, and its address.
func (c *client) http() (*http.Client, *url.URL, error) {
	config := rest.CopyConfig(c.config)
	config.Timeout = 0
	web, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	base.Path = strings.TrimSuffix(base.Path, "/")
	return web, base, nil
}

// upload is a file that is sent in chunks.
type upload struct {
	client *http.Client
	url    string
	file   *os.File
	total  int64
	bar    *bar
}

func (u upload) run(ctx context.Context) error {
	state, err := u.ask(ctx, http.MethodGet, "", nil, 0)
	if err != nil {
		return err
	}
	at := state.Received
	if state.Total != u.total {
		at = 0
	}
	failures := 0
	for !state.Complete {
		size := min(chunk, u.total-at)
		body := &watched{Reader: io.NewSectionReader(u.file, at, size), n: at, total: u.total, bar: u.bar}
		state, err = u.ask(ctx, http.MethodPut, fmt.Sprintf("bytes %d-%d/%d", at, at+size-1, u.total), body, size)
		switch {
		case err == nil:
			at, failures = state.Received, 0
		case ctx.Err() != nil || failures == attempts:
			return fmt.Errorf("sending the image: %w; the same command goes on with it", err)
		default:
			failures++
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(failures) * time.Second):
			}
			if again, err := u.ask(ctx, http.MethodGet, "", nil, 0); err == nil {
				at, state = again.Received, again
			}
		}
	}
	return nil
}

// errRefused: the server does not want it.
var errRefused = errors.New("refused")

// ask makes a request and reads how much is there.
func (u upload) ask(ctx context.Context, method, contentRange string, body io.Reader, size int64) (content.Uploaded, error) {
	var out content.Uploaded
	req, err := http.NewRequestWithContext(ctx, method, u.url, body)
	if err != nil {
		return out, err
	}
	if contentRange != "" {
		req.Header.Set("Content-Range", contentRange)
		req.ContentLength = size
	}
	answer, err := u.client.Do(req)
	if err != nil {
		return out, err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	if err != nil {
		return out, err
	}
	if answer.StatusCode == http.StatusOK || answer.StatusCode == http.StatusConflict {
		if err := json.Unmarshal(b, &out); err == nil && (out.Total > 0 || out.Complete || method == http.MethodGet) {
			return out, nil
		}
	}
	return out, fmt.Errorf("%w: %s: %s", errRefused, answer.Status, statusMessage(b))
}

// statusMessage is what a Status says.
func statusMessage(b []byte) string {
	var s struct{ Message string }
	if json.Unmarshal(b, &s) == nil && s.Message != "" {
		return s.Message
	}
	b = bytes.TrimSpace(b)
	return string(b[:min(len(b), 300)])
}

// ExportOptions say what to export.
type ExportOptions struct {
	Name, Namespace string
	Format          string
	// File is where it goes; its extension tells the format if that is empty.
	File string
	Disk int
}

// Export writes an image into a file.
func (c Config) Export(ctx context.Context, o ExportOptions) error {
	if o.Format == "" {
		o.Format = strings.TrimPrefix(strings.ToLower(filepath.Ext(o.File)), ".")
		if o.Format == "img" {
			o.Format = "raw"
		}
	}
	cl, err := c.client()
	if err != nil {
		return err
	}
	item, err := cl.find(ctx, o.Namespace, o.Name)
	if err != nil {
		return err
	}
	if reason, message := item.State(); !item.Status.Ready {
		return fmt.Errorf("%s is not ready: %s: %s", item, reason, message)
	}
	if o.File == "" {
		o.File = library.ExportName(item.DisplayName(), o.Format)
	}
	bar := c.bar("exporting")
	defer bar.end()
	part := o.File + ".part"
	defer os.Remove(part) // is gone when all went well
	if l := c.Library(); l != nil {
		err = l.Export(ctx, string(item.UID), library.ExportOptions{Format: o.Format, Disk: o.Disk, Name: item.DisplayName()}, part, bar.show)
	} else {
		err = c.download(ctx, cl, item, o, part, bar)
	}
	if err != nil {
		return err
	}
	if err := os.Rename(part, o.File); err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	bar.end()
	info, err := os.Stat(o.File)
	if err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	c.Printf("exported %s to %s (%s)\n", item.DisplayName(), o.File, text.Size(info.Size()))
	return nil
}

// download has the API server export an image.
func (c Config) download(ctx context.Context, cl *client, item Item, o ExportOptions, to string, bar *bar) error {
	web, base, err := cl.http()
	if err != nil {
		return err
	}
	base.Path += content.Path(item.Namespace, item.Name, content.Content)
	query := url.Values{}
	if o.Format != "" {
		query.Set(content.FormatParameter, o.Format)
	}
	if o.Disk >= 0 {
		query.Set(content.DiskParameter, strconv.Itoa(o.Disk))
	}
	base.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.String(), nil)
	if err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	answer, err := web.Do(req)
	if err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
		return fmt.Errorf("exporting %s: %s: %s", item, answer.Status, statusMessage(b))
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	_, err = io.Copy(f, &watched{Reader: answer.Body, total: answer.ContentLength, bar: bar})
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("exporting %s: %w", item, err)
	}
	return nil
}
