package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// maxStored bounds one stored file.
const maxStored = 64 << 20

var storedName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$`)

// serveHTTP serves the page and the file store on port 80.
func (s *system) serveHTTP() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.page)
	mux.HandleFunc("GET /hostname", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, hostname()) })
	mux.HandleFunc("GET /data/{name}", s.load)
	mux.HandleFunc("PUT /data/{name}", s.store)
	server := &http.Server{Addr: ":80", Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	for {
		err := server.ListenAndServe()
		s.say("web server: %v", err)
		<-time.After(time.Second)
	}
}

// serveTFTP answers every request for a file with the name of the machine: a way to try datagrams.
func (s *system) serveTFTP() {
	for {
		err := answerTFTP(":69")
		s.say("TFTP server: %v", err)
		<-time.After(time.Second)
	}
}

// answerTFTP sends one block, which a short one ends, to whoever asks (RFC 1350).
func answerTFTP(address string) error {
	const request, data, block = 1, 3, 1
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		return fmt.Errorf("listening at %s: %w", address, err)
	}
	defer func() { _ = conn.Close() }()
	packet := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(packet)
		if err != nil {
			return fmt.Errorf("reading: %w", err)
		}
		if n > 2 && packet[0] == 0 && packet[1] == request {
			_, _ = conn.WriteTo(append([]byte{0, data, 0, block}, "hello from "+hostname()+"\n"...), from)
		}
	}
}

func (s *system) page(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	boots := s.boots
	s.mu.Unlock()
	product, _ := os.ReadFile("/sys/class/dmi/id/product_uuid")
	fmt.Fprintf(w, "hello from %s, a virtual machine\nuptime %s\nboots %d\nuuid %s\n", hostname(), uptime(), boots, strings.TrimSpace(string(product)))
	for _, address := range addresses() {
		fmt.Fprintln(w, "address", address)
	}
}

func (s *system) load(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	if !storedName.MatchString(name) {
		http.Error(w, "such a name cannot be stored", http.StatusBadRequest)
		return
	}
	http.ServeFile(w, r, filepath.Join("/data/files", name))
}

func (s *system) store(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	if !storedName.MatchString(name) {
		http.Error(w, "such a name cannot be stored", http.StatusBadRequest)
		return
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxStored))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	if err == nil {
		err = writeFileSync(filepath.Join("/data/files", name), data)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, len(data), "bytes are on the disk")
}
