// Package assets holds the files that travel inside the atoll binary (the
// atoll-pod binary, the pod kernel, the guest's exec helper, the pause image)
// and writes them to the data directory.
//
// The build puts them under files/, compressed, with a manifest; package
// assets/pack does that. A binary that was built without them (plain `go
// build`) works for everything but running pods, and Load says so with
// ErrMissing.
//
// It is called by `atoll up`. What can go wrong: the disk is full (the old file
// stays), or a file on disk was damaged (it is written again, with a warning).
package assets

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/zstd"
)

// Names of the files.
const (
	AtollPod   = "atoll-pod"
	Kernel     = "vmlinux"
	ExecHelper = "exec"
	PauseImage = "pause.tar"
)

// ManifestFile is the manifest's name beside the compressed files.
const ManifestFile = "manifest.json"

// ErrMissing says that the binary was built without a file.
var ErrMissing = errors.New("this atoll binary was built without its guest files; build it with `make build`")

//go:embed files/*
var embedded embed.FS

// Entry describes one file before compression.
type Entry struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Set is a set of compressed files.
type Set struct {
	files    fs.FS
	manifest map[string]Entry
}

// Embedded returns the set in this binary.
func Embedded() (*Set, error) {
	sub, err := fs.Sub(embedded, "files")
	if err != nil {
		return nil, fmt.Errorf("opening the embedded files: %w", err)
	}
	return Load(sub)
}

// Load reads the manifest of a set.
func Load(files fs.FS) (*Set, error) {
	b, err := fs.ReadFile(files, ManifestFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrMissing
	}
	if err != nil {
		return nil, fmt.Errorf("reading the manifest of embedded files: %w", err)
	}
	s := &Set{files: files}
	if err := json.Unmarshal(b, &s.manifest); err != nil {
		return nil, fmt.Errorf("parsing the manifest of embedded files: %w", err)
	}
	return s, nil
}

// Entry returns what the manifest says about a file.
func (s *Set) Entry(name string) (Entry, error) {
	e, ok := s.manifest[name]
	if !ok {
		return Entry{}, fmt.Errorf("%s: %w", name, ErrMissing)
	}
	return e, nil
}

// copyTo decompresses a file to w and checks it against the manifest.
func (s *Set) copyTo(w io.Writer, name string) error {
	want, err := s.Entry(name)
	if err != nil {
		return err
	}
	f, err := s.files.Open(name + ".zst")
	if err != nil {
		return fmt.Errorf("opening embedded %s: %w", name, err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		return fmt.Errorf("decompressing %s: %w", name, err)
	}
	defer z.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, sum), z)
	if err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); n != want.Size || got != want.SHA256 {
		return fmt.Errorf("embedded %s does not match the manifest; build the binary again", name)
	}
	return nil
}
