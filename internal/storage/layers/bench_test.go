package layers

import (
	"fmt"
	"testing"
)

// bigLayer is a layer of 12,000 files in 600 directories, about 190 MB: many
// small files, some of a few hundred kilobytes, as in a distribution's image.
func bigLayer(b *testing.B) []byte {
	text := repeat(1 << 20)
	var es []entry
	for d := range 600 {
		es = append(es, entry{name: fmt.Sprintf("d%03d/", d)})
		for f := range 20 {
			size := 700 * (f + 1)
			if f == 0 {
				size = 200000
			}
			at := (d*31 + f*977) % (len(text) - size)
			es = append(es, entry{name: fmt.Sprintf("d%03d/file-%d", d, f), content: text[at : at+size]})
		}
	}
	return layerTar(b, es)
}

// BenchmarkUnpack is the way of one layer from its uncompressed tar to a
// synced image.
func BenchmarkUnpack(b *testing.B) {
	data := bigLayer(b)
	b.SetBytes(int64(len(data)))
	bench := newBench(b)
	desc := bench.blob(b, data)
	for i := 0; b.Loop(); i++ {
		if err := bench.unpack(b.Context(), b, fmt.Sprintf("k8s.io/2/%d", i), "", desc); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMerge is the first use of an image of two layers.
func BenchmarkMerge(b *testing.B) {
	data := bigLayer(b)
	b.SetBytes(int64(len(data)))
	bench := newBench(b)
	base := bench.blob(b, data)
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		top := bench.blob(b, layerTar(b, []entry{{name: "top", content: fmt.Sprint(i)}, {name: "d001/.wh.file-1"}}))
		lower, upper := fmt.Sprintf("k8s.io/2/%d", i), fmt.Sprintf("k8s.io/3/%d", i)
		if err := bench.unpack(b.Context(), b, lower, "", base); err != nil {
			b.Fatal(err)
		}
		if err := bench.unpack(b.Context(), b, upper, lower, top); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		bench.container(b, fmt.Sprintf("k8s.io/9/%d", i), upper)
		b.StopTimer()
		for _, key := range []string{fmt.Sprintf("k8s.io/9/%d", i), upper, lower} {
			if err := bench.sn.Remove(b.Context(), key); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}

// BenchmarkContainer is the snapshot of one more container of a used image.
func BenchmarkContainer(b *testing.B) {
	bench := newBench(b)
	name := bench.image(b, layerTar(b, users("u")), layerTar(b, users("v")))
	bench.container(b, "k8s.io/9/first", name)
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprintf("k8s.io/9/%d", i)
		if _, err := bench.sn.Prepare(b.Context(), key, name); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := bench.sn.Remove(b.Context(), key); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
