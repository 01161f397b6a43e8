package registry

import (
	"errors"
	"testing"
)

// TestLateDeletionLeavesTheNextNamespace: that a namespace has gone is heard when another of its name has pushed already.
func TestLateDeletionLeavesTheNextNamespace(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	h.change(func() { h.namespaces["shop"] = "uid-of-another" })
	h.push("shop/web:2", h.image(512, 1), h.as("olga"))
	if err := errors.Join(h.reg.Deleted("shop", "uid-shop"), h.reg.Forget("shop")); err != nil {
		t.Fatal(err)
	}
	if err := h.pull("shop/web:2", h.as("olga")); err != nil {
		t.Errorf("the images of the next namespace: %v", err)
	}
	if err := h.reg.Deleted("shop", "uid-of-another"); err != nil {
		t.Fatal(err)
	}
	refused(t, h.pull("shop/web:2", h.as("olga")), "MANIFEST_UNKNOWN")
}

// late is a directory in which a namespace is made at the moment when somebody has looked for it in vain.
type late struct {
	*cluster
	made func()
}

func (l *late) Exists(name string) bool {
	there := l.cluster.Exists(name)
	if !there && l.made != nil {
		made := l.made
		l.made = nil
		made()
	}
	return there
}

func TestNamespacesThatCameMeanwhileStay(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(512, 1), h.as("olga"))
	h.push("bank/web:1", h.image(512, 1), h.as("root"))
	h.change(func() {
		delete(h.namespaces, "shop")
		delete(h.namespaces, "bank")
	})
	directory := &late{cluster: h.cluster}
	h.reg.cfg.Directory = directory
	directory.made = func() {
		h.change(func() { h.namespaces["bank"], h.namespaces["shop"] = "uid-next", "uid-next-too" })
		h.push("bank/web:2", h.image(512, 1), h.as("root"))
	}
	h.reg.forgetOthers()
	if err := h.pull("bank/web:2", h.as("root")); err != nil {
		t.Errorf("the images of a namespace that came meanwhile: %v", err)
	}
}
