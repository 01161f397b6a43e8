package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Files of cloud-init that say how it went.
const (
	cloudDir    = "/run/cloud-init"
	statusFile  = cloudDir + "/status.json"
	resultFile  = cloudDir + "/result.json"
	guestInfo   = "/run/atoll/guestinfo"
	statusRun   = "running"
	statusDone  = "done"
	statusError = "error"
)

// cloudStatus is what has happened so far.
type cloudStatus struct {
	source   string
	errors   []string
	finished bool
}

func (c cloudStatus) word() string {
	switch {
	case len(c.errors) > 0:
		return statusError
	case c.finished:
		return statusDone
	}
	return statusRun
}

// failCloud notes an error of the seed.
func (s *system) failCloud(err error) {
	s.say("cloud-init: %v", err)
	s.changeCloud(func(c *cloudStatus) { c.errors = append(c.errors, err.Error()) })
}

func (s *system) finishCloud(source string) {
	s.changeCloud(func(c *cloudStatus) { c.source, c.finished = source, true })
}

// changeCloud writes the files anew, in cloud-init's form.
func (s *system) changeCloud(change func(*cloudStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.cloud)
	list := s.cloud.errors
	if list == nil {
		list = []string{}
	}
	now := float64(time.Now().UnixMilli()) / 1000
	stage := map[string]any{"errors": list, "start": now, "finished": nil}
	status := map[string]any{"datasource": s.cloud.source, "stage": "modules-final", "modules-final": stage}
	if s.cloud.finished {
		stage["finished"], status["stage"] = now, nil
	}
	_ = os.MkdirAll(cloudDir, 0o755)
	writeJSON(statusFile, map[string]any{"v1": status})
	if s.cloud.finished {
		writeJSON(resultFile, map[string]any{"v1": map[string]any{"datasource": s.cloud.source, "errors": list}})
	}
}

func writeJSON(name string, value any) {
	data, err := json.Marshal(value)
	if err == nil {
		_ = os.WriteFile(name, append(data, '\n'), 0o644)
	}
}

// cloudInitCommand is `cloud-init status [--wait] [--long] [--format json]`.
func cloudInitCommand(args []string) int {
	if len(args) == 0 || args[0] != "status" {
		fmt.Fprintln(os.Stderr, "usage: cloud-init status [--wait] [--long] [--format json]")
		return 2
	}
	options := strings.Join(args, " ")
	status := readStatus()
	for strings.Contains(options, "--wait") && status.word() == statusRun {
		<-time.After(200 * time.Millisecond)
		status = readStatus()
	}
	detail := status.source
	if len(status.errors) > 0 {
		detail = strings.Join(status.errors, "\n")
	}
	switch {
	case strings.Contains(options, "json"):
		data, _ := json.MarshalIndent(map[string]any{
			"status": status.word(), "detail": detail, "errors": append([]string{}, status.errors...), "datasource": "nocloud",
		}, "", "  ")
		fmt.Println(string(data))
	case strings.Contains(options, "--long"):
		fmt.Printf("status: %s\ndetail:\n%s\n", status.word(), detail)
	default:
		fmt.Printf("status: %s\n", status.word())
	}
	if status.word() == statusError {
		return 1
	}
	return 0
}

func readStatus() cloudStatus {
	var file struct {
		V1 struct {
			DataSource string  `json:"datasource"`
			Stage      *string `json:"stage"`
			Final      struct {
				Errors []string `json:"errors"`
			} `json:"modules-final"`
		} `json:"v1"`
	}
	data, err := os.ReadFile(statusFile)
	if err != nil || json.Unmarshal(data, &file) != nil {
		return cloudStatus{}
	}
	return cloudStatus{source: file.V1.DataSource, errors: file.V1.Final.Errors, finished: file.V1.Stage == nil}
}

// rpcToolCommand is `vmware-rpctool "info-set guestinfo.KEY VALUE"` and info-get,
// which guests use to tell the host something. Values are files; the host reads
// them through the guest agent.
func rpcToolCommand(args []string) int {
	words := strings.SplitN(strings.Join(args, " "), " ", 3)
	if len(words) < 2 || strings.ContainsAny(words[1], "/\x00") || strings.HasPrefix(words[1], ".") {
		fmt.Fprintln(os.Stderr, `usage: vmware-rpctool "info-set KEY VALUE" | "info-get KEY"`)
		return 1
	}
	file := filepath.Join(guestInfo, words[1])
	switch {
	case words[0] == "info-get":
		value, err := os.ReadFile(file)
		if err != nil {
			fmt.Fprintln(os.Stderr, "No value found")
			return 1
		}
		fmt.Println(string(value))
		return 0
	case words[0] == "info-set" && len(words) == 3:
		if err := os.MkdirAll(guestInfo, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if err := os.WriteFile(file, []byte(words[2]), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	fmt.Fprintln(os.Stderr, `usage: vmware-rpctool "info-set KEY VALUE" | "info-get KEY"`)
	return 1
}
