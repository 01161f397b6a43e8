//go:build e2e

package e2e

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
)

// bodyRepeat makes a row about a kilobyte: its body is the digest of its number, so many times.
const bodyRepeat = 32

// writers is how many clients write at the same time.
const writers = 3

// ledger is the clients of a database and what they know, outside of the database's machine: which rows they
// tried to write, and which of them were acknowledged.
type ledger struct {
	t    *testing.T
	db   *sql.DB
	stop func()

	// gate is held for reading while a client waits for an answer.
	gate sync.RWMutex

	mu        sync.Mutex
	attempted map[int64]int // number of a row to its writer; all that were ever tried
	kept      map[int64]bool
	acked     int
	lastErr   error // the newest, also when writing has gone on since
}

// openLedger does not connect yet.
func openLedger(t *testing.T, address, password string) *ledger {
	t.Helper()
	dsn := url.URL{
		Scheme: "postgres", Host: address + ":5432", Path: "/postgres", User: url.UserPassword("postgres", password),
		RawQuery: "sslmode=disable&connect_timeout=5",
	}
	connector, err := pq.NewConnector(dsn.String())
	if err != nil {
		t.Fatal(err)
	}
	connector.Dialer(dialer{})
	l := &ledger{t: t, db: sql.OpenDB(connector), attempted: map[int64]int{}, kept: map[int64]bool{}}
	l.db.SetMaxIdleConns(writers)
	t.Cleanup(func() { _ = l.db.Close() })
	return l
}

// answerTimeout is how long a client waits for the database. A machine that was killed never answers.
const answerTimeout = 15 * time.Second

// dialer makes connections that are given up after answerTimeout.
type dialer struct{}

func (dialer) Dial(network, address string) (net.Conn, error) {
	return dialer{}.DialTimeout(network, address, answerTimeout)
}

func (dialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout(network, address, timeout)
	return impatient{c}, err
}

type impatient struct{ net.Conn }

func (c impatient) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (l *ledger) prepare() {
	l.t.Helper()
	eventually(l.t, "the tables", func() error {
		_, err := l.db.Exec(`
			CREATE EXTENSION IF NOT EXISTS amcheck;
			DROP TABLE IF EXISTS rows, totals;
			CREATE TABLE rows (id bigint PRIMARY KEY, writer int NOT NULL, body text NOT NULL);
			CREATE INDEX ON rows (writer, id);
			CREATE TABLE totals (writer int PRIMARY KEY, rows int NOT NULL);
			INSERT INTO totals SELECT generate_series(0, ` + strconv.Itoa(writers-1) + `), 0;`)
		return err
	})
}

// start lets the clients write until stop.
func (l *ledger) start() {
	ctx, cancel := context.WithCancel(l.t.Context())
	var clients sync.WaitGroup
	for writer := range writers {
		clients.Go(func() {
			for ctx.Err() == nil {
				if err := l.write(writer); err != nil {
					select {
					case <-ctx.Done():
					case <-time.After(200 * time.Millisecond):
					}
				}
			}
		})
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		clients.Wait()
	})
	l.t.Cleanup(l.stop)
}

// write adds a row and counts it, in one transaction.
func (l *ledger) write(writer int) error {
	l.gate.RLock()
	defer l.gate.RUnlock()
	l.mu.Lock()
	id := int64(len(l.attempted) + 1)
	l.attempted[id] = writer
	l.mu.Unlock()
	_, err := l.db.Exec(`
		WITH new AS (INSERT INTO rows VALUES ($1::bigint, $2::int, repeat(md5($1::bigint::text), $3::int)) RETURNING writer)
		UPDATE totals SET rows = rows + 1 FROM new WHERE totals.writer = new.writer`, id, writer, bodyRepeat)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.lastErr = err
		return err
	}
	l.kept[id] = true
	l.acked++
	return nil
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked
}

// progress waits for so many further acknowledgements.
func (l *ledger) progress(rows int) {
	l.t.Helper()
	from := l.count()
	eventually(l.t, "the clients to write", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.acked < from+rows {
			return fmt.Errorf("%d rows of %d; the last error: %w", l.acked-from, rows, l.lastErr)
		}
		return nil
	})
}

// verdict is what verify saw.
type verdict struct {
	acknowledged, rows int
	unknown            int // rows that are there though nobody got an answer
	lastErr            error
}

// verify compares the tables with what the clients know, while these wait. What it has read must stay, too.
func (l *ledger) verify() verdict {
	l.t.Helper()
	l.gate.Lock()
	defer l.gate.Unlock()
	var found map[int64]int
	eventually(l.t, "an answer with all rows", func() error {
		var err error
		found, err = l.read()
		if late, ok := errors.AsType[net.Error](err); err != nil && !errors.Is(err, driver.ErrBadConn) && (!ok || !late.Timeout()) {
			l.t.Fatalf("reading all rows: %v", err)
		}
		return err
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	var missing, foreign []string
	for id := range l.kept {
		if _, ok := found[id]; !ok {
			missing = append(missing, fmt.Sprint(id))
		}
	}
	for id, writer := range found {
		if w, ok := l.attempted[id]; !ok || w != writer {
			foreign = append(foreign, fmt.Sprint(id))
		}
		l.kept[id] = true
	}
	if len(missing)+len(foreign) > 0 {
		l.t.Fatalf("of %d acknowledged rows are missing: [%s]; rows that nobody wrote: [%s]", l.acked, strings.Join(missing, " "), strings.Join(foreign, " "))
	}
	v := verdict{acknowledged: l.acked, rows: len(found), unknown: len(found) - l.acked, lastErr: l.lastErr}
	l.lastErr = nil
	return v
}

// read returns all rows with their writers, after checks that need nothing but the tables.
func (l *ledger) read() (map[int64]int, error) {
	tx, err := l.db.BeginTx(context.Background(), &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }()
	rows, err := tx.Query(`SELECT id, writer, body = repeat(md5(id::text), $1) FROM rows`, bodyRepeat)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found, counts := map[int64]int{}, [writers]int{}
	for rows.Next() {
		var id int64
		var writer int
		var sound bool
		if err := rows.Scan(&id, &writer, &sound); err != nil {
			return nil, err
		}
		if _, twice := found[id]; twice || !sound || writer < 0 || writer >= writers {
			return nil, fmt.Errorf("row %d is damaged (twice: %t, body as written: %t, writer %d)", id, twice, sound, writer)
		}
		found[id] = writer
		counts[writer]++
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	for writer, count := range counts {
		var total int
		if err := tx.QueryRow(`SELECT rows FROM totals WHERE writer = $1`, writer).Scan(&total); err != nil {
			return nil, fmt.Errorf("total of writer %d: %w", writer, err)
		}
		if total != count {
			return nil, fmt.Errorf("half a transaction: writer %d has %d rows and a total of %d", writer, count, total)
		}
	}
	return found, nil
}
