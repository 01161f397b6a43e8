package disks

import (
	"context"
	"errors"
	"fmt"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/linux/mkfs"
)

// chunkBytes bounds the data of one call to the guest, with room for the message around it.
const chunkBytes = 512 << 10

// format makes a file system here and has the guest write it on the blank disk.
func (s *Set) format(ctx context.Context, d *disk, fsType string) error {
	img, err := mkfs.New(ctx, fsType, d.size, s.cfg.Scratch)
	if err != nil {
		return err
	}
	defer img.Close()
	req := &guestv1.WriteDiskRequest{Serial: d.serial, First: true}
	size := 0
	send := func() error {
		_, err := s.guest.WriteDisk(ctx, req)
		req, size = &guestv1.WriteDiskRequest{Serial: d.serial}, 0
		return err
	}
	err = img.Each(chunkBytes/2, func(offset int64, data []byte) error {
		req.Extents = append(req.Extents, &guestv1.Extent{Offset: uint64(offset), Data: append([]byte(nil), data...)})
		const around = 32 // bytes of an extent besides its data
		if size += len(data) + around; size >= chunkBytes/2 {
			return send()
		}
		return nil
	})
	req.Last = true
	if err = errors.Join(err, sendIf(err == nil, send)); err != nil {
		return fmt.Errorf("formatting the volume: %w", err)
	}
	return nil
}

func sendIf(ok bool, send func() error) error {
	if !ok {
		return nil
	}
	return send()
}
