// Command gotest runs `go test` and prints what a person and a CI want to see:
// one line per package, the output of what failed, and closing lines with
// numbers and what each failed test said.
//
//	gotest -stage <name> -log <file> -- <arguments of go test>
//	gotest -total <directory>      adds up the stages that ran there
//
// The log gets all output; a summary is written beside it for -total. The exit
// code is 1 when anything failed.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// event is one line of `go test -json`.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

// summary is what a stage leaves behind.
type summary struct {
	Stage   string  `json:"stage"`
	Passed  int     `json:"passed"`
	Failed  int     `json:"failed"`
	Skipped int     `json:"skipped"`
	Seconds float64 `json:"seconds"`
	// Broken are packages that failed without a failing test: they do not
	// compile, or crashed.
	Broken []string `json:"broken,omitempty"`
	// Failures are the failed tests, each with what it said of it.
	Failures []failure `json:"failures,omitempty"`
}

type failure struct {
	Test string `json:"test"`
	// Messages are the first lines of what it reported, with file and line.
	Messages []string `json:"messages,omitempty"`
}

// Bounds of what the closing lines say of one test.
const (
	maxMessages = 12
	maxMessage  = 1000
)

// message is how `go test` begins what a test reports or logs.
var message = regexp.MustCompile(`^\s+\S+\.go:\d+: `)

func main() {
	stage := flag.String("stage", "test", "`name` of the stage")
	log := flag.String("log", "", "`file` for the whole output")
	total := flag.String("total", "", "`directory` with the logs of stages to add up")
	flag.Parse()
	var s summary
	var err error
	if *total != "" {
		s, err = addUp(*total)
	} else {
		s, err = run(*stage, *log, flag.Args())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(1)
	}
	fmt.Println(s)
	if s.Failed > 0 || len(s.Broken) > 0 {
		os.Exit(1)
	}
}

func (s summary) String() string {
	line := fmt.Sprintf("%s: %d passed, %d failed, %d skipped in %.0f s", s.Stage, s.Passed, s.Failed, s.Skipped, s.Seconds)
	if len(s.Broken) > 0 {
		line += "; broken packages: " + strings.Join(s.Broken, " ")
	}
	for _, f := range s.Failures {
		line += "\n  " + f.Test
		for _, m := range f.Messages {
			line += "\n    " + m
		}
	}
	return line
}

// failed is what the output of a test says of its failure. What it said last
// counts most.
func failed(test string, output []string) failure {
	f := failure{Test: test}
	for _, line := range output {
		if message.MatchString(line) {
			line = strings.TrimSpace(line)
			f.Messages = append(f.Messages, line[:min(len(line), maxMessage)])
		}
	}
	f.Messages = f.Messages[max(len(f.Messages)-maxMessages, 0):]
	return f
}

// run runs one stage.
func run(stage, logPath string, args []string) (summary, error) {
	if logPath == "" {
		return summary{}, errors.New("-log is missing")
	}
	if err := os.MkdirAll(filepath.Dir(logPath), 0o755); err != nil {
		return summary{}, err
	}
	log, err := os.Create(logPath)
	if err != nil {
		return summary{}, err
	}
	defer log.Close()
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return summary{}, err
	}
	cmd.Stderr = io.MultiWriter(os.Stderr, log)
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return summary{}, err
	}
	r := &reader{summary: summary{Stage: stage}, log: log, output: map[string][]string{}, failed: map[string]bool{}}
	if err := r.read(out); err != nil {
		return summary{}, err
	}
	err = cmd.Wait()
	s := r.summary
	s.Seconds = time.Since(began).Seconds()
	if err != nil && s.Failed == 0 && len(s.Broken) == 0 {
		s.Broken = []string{"go test itself (" + err.Error() + ")"}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return s, err
	}
	return s, os.WriteFile(strings.TrimSuffix(logPath, ".log")+".json", b, 0o644)
}

// reader turns events into lines and numbers.
type reader struct {
	summary
	log    io.Writer
	output map[string][]string // of tests and packages that have not ended
	failed map[string]bool     // packages with a failed test
}

func (r *reader) read(in io.Reader) error {
	scanner := bufio.NewScanner(in)
	scanner.Buffer(nil, 16<<20)
	for scanner.Scan() {
		var e event
		if json.Unmarshal(scanner.Bytes(), &e) != nil {
			fmt.Println(scanner.Text())
			continue
		}
		if _, err := io.WriteString(r.log, e.Output); err != nil {
			return err
		}
		if e.Test == "" {
			r.packageEvent(e)
		} else {
			r.testEvent(e)
		}
	}
	return scanner.Err()
}

func (r *reader) testEvent(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		r.output[key] = append(r.output[key], e.Output)
		return
	case "pass":
		r.Passed++
	case "skip":
		r.Skipped++
	case "fail":
		r.Failed++
		r.failed[e.Package] = true
		r.Failures = append(r.Failures, failed(e.Test, r.output[key]))
		fmt.Print(strings.Join(r.output[key], ""))
	default:
		return
	}
	delete(r.output, key)
}

func (r *reader) packageEvent(e event) {
	name := e.Package
	if name == "" {
		name = e.ImportPath // build-output and build-fail
	}
	switch e.Action {
	case "output", "build-output":
		r.output[name] = append(r.output[name], e.Output)
	case "pass":
		fmt.Printf("ok    %-60s %6.1fs\n", name, e.Elapsed)
	case "fail":
		fmt.Printf("FAIL  %-60s %6.1fs\n", name, e.Elapsed)
		if !r.failed[name] {
			r.Broken = append(r.Broken, name)
			fmt.Print(strings.Join(r.unfinished(name), ""))
		}
	case "build-fail":
		fmt.Print(strings.Join(r.output[name], ""))
	}
}

// unfinished returns the output of a package that crashed: its own and that of
// tests that never ended.
func (r *reader) unfinished(pkg string) []string {
	out := r.output[pkg]
	var keys []string
	for key := range r.output {
		if strings.HasPrefix(key, pkg+" ") {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		out = append(out, r.output[key]...)
	}
	return out
}

// addUp reads the summaries of the stages.
func addUp(dir string) (summary, error) {
	files, err := filepath.Glob(filepath.Join(dir, "test-*.json"))
	if err != nil {
		return summary{}, err
	}
	total := summary{Stage: "TOTAL"}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return total, err
		}
		var s summary
		if err := json.Unmarshal(b, &s); err != nil {
			return total, fmt.Errorf("reading %s: %w", f, err)
		}
		total.Failures = append(total.Failures, s.Failures...)
		s.Failures = nil // told once, at the end
		fmt.Println(s)
		total.Passed += s.Passed
		total.Failed += s.Failed
		total.Skipped += s.Skipped
		total.Seconds += s.Seconds
		total.Broken = append(total.Broken, s.Broken...)
	}
	if len(files) == 0 {
		return total, errors.New("no stage ran")
	}
	return total, nil
}
