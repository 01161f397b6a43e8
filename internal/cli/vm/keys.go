package vm

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
)

// sshUser is the user that `atoll vm create` makes in a guest and `atoll vm ssh` logs in as.
const sshUser = "atoll"

// userAnnotation of a virtual machine names the user with the key, when it was made by `atoll vm create`.
const userAnnotation = "atoll.dev/ssh-user"

// key is a person's key for guests.
type key struct {
	public  string // a line of authorized_keys
	private string // file, "" when it is the ssh client's own business
	made    bool
}

// ownKey is the private key that is made for people who have none.
func (c *commands) ownKey() string {
	return filepath.Join(c.Getenv("HOME"), ".atoll", "id_ed25519")
}

// sshKey is the key to put into a guest: of the file, else a person's own, else one that is made now.
func (c *commands) sshKey(file string) (key, error) {
	if file != "" {
		line, err := publicKey(file)
		if err != nil {
			return key{}, fmt.Errorf("--ssh-key: %w", err)
		}
		return key{public: line}, nil
	}
	home := c.Getenv("HOME")
	if home == "" {
		return key{}, errors.New("HOME is not set, so there is no place for a key; use --ssh-key FILE")
	}
	for _, name := range []string{"id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub"} {
		if line, err := publicKey(filepath.Join(home, ".ssh", name)); err == nil {
			return key{public: line}, nil
		}
	}
	own := c.ownKey()
	if line, err := publicKey(own + ".pub"); err == nil {
		return key{public: line, private: own}, nil
	}
	line, err := makeKey(own)
	if err != nil {
		return key{}, fmt.Errorf("making an ssh key: %w", err)
	}
	return key{public: line, private: own, made: true}, nil
}

// publicKey reads a file with one line of authorized_keys.
func publicKey(file string) (string, error) {
	const most = 64 << 10
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	if len(data) > most || strings.Contains(string(data), "PRIVATE KEY") {
		return "", fmt.Errorf("%s holds no public key; name the .pub file", file)
	}
	parsed, comment, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		return "", fmt.Errorf("%s holds no public key: %w", file, err)
	}
	return strings.TrimSpace(strings.TrimSpace(string(ssh.MarshalAuthorizedKey(parsed))) + " " + comment), nil
}

// makeKey writes a key pair, the private part for its owner only.
func makeKey(file string) (string, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", err
	}
	block, err := ssh.MarshalPrivateKey(private, "atoll vm")
	if err != nil {
		return "", err
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		return "", err
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPublic))) + " atoll-vm"
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return "", err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("%s exists, but %s.pub cannot be read; mend or remove it", file, file)
	}
	if err != nil {
		return "", err
	}
	_, err = f.Write(pem.EncodeToMemory(block))
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	return line, os.WriteFile(file+".pub", []byte(line+"\n"), 0o644)
}
