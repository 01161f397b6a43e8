/*
 * exec: the last step between guest init and a container's process.
 *
 * Guest init (Go) forks this program into the container's cgroup and namespaces with two pipes: a
 * compiled program comes from descriptor 3, errors go to descriptor 4. It waits for the program,
 * loads it at a fixed address, runs its operations (raw system calls, in order) and, as the last of
 * them, execs the user's command. A first program may prepare for one that comes later. When an operation fails it writes {step, errno} and exits.
 * Starting a second copy of the Go binary instead would cost tens of milliseconds under emulation.
 *
 * It is not a security boundary: whoever writes the program may do anything. The format is defined
 * together with internal/guest/program, which is the only writer; both must change together.
 *
 * Without a program it is what the warm-up of a micro-VM runs as a container: it then waits for the end
 * of stdin and touches pages of its file on the way, as an ordinary program would.
 *
 * No libc, no allocation. Linux, x86-64.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define BASE 0x100000000UL /* where the program is loaded; base in Go */
#define MAX (1UL << 20)    /* its size at most; maxSize in Go */
#define MAGIC 0x31585441u  /* "ATX1" */
#define PROGRAM_FD 3
#define ERROR_FD 4

enum { NR_READ = 0, NR_WRITE = 1, NR_MMAP = 9, NR_PRCTL = 157, NR_EXIT_GROUP = 231 };

/* What a process has by default. Threads of init have more (see slowMonitor), and children inherit it. */
enum { SET_TIMERSLACK = 29, TIMERSLACK_NS = 50000 };

/* Operations that are not system calls. */
enum {
	OP_FAIL = 0xf000,    /* fail with errno a[0] */
	OP_STORE32 = 0xf001, /* *(u32 *)a[0] = a[1] */
	OP_FAIL_LAST = 0xf002, /* fail with the last tolerated errno */
	OP_NEXT = 0xf003,    /* go on with the next program from the pipe; registers keep their values */
};

enum {
	F_OK_JUMP = 1,  /* on success go to target */
	F_ERR_JUMP = 2, /* on a tolerated error go to target */
	F_ANY_ERR = 4,  /* tolerate every error */
};

struct op {
	u16 nr;     /* system call or OP_* */
	u16 step;   /* reported when it fails */
	u8 save;    /* register for the result, 0: none */
	u8 regs;    /* bit i: a[i] is the number of a register */
	u8 flags;
	u8 pad;
	u32 target; /* index of an operation */
	u8 err[4];  /* tolerated errno values */
	u64 a[6];
};

struct header {
	u32 magic;
	u32 count;
	u32 entry; /* offset of the first operation */
	u32 size;  /* of the whole program */
};

/* What the warm-up touches: read-only pages of the file, a writable one, and memory without a file. */
enum { PAGE = 4096 };
static const u8 text[24 * PAGE] = { 1 };
static volatile u8 data[PAGE] = { 1 };
static volatile u8 bss[4 * PAGE];

static u64 reg[256];

static long sys(u64 nr, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
	long ret;
	register u64 r10 __asm__("r10") = d;
	register u64 r8 __asm__("r8") = e;
	register u64 r9 __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

static void __attribute__((noreturn)) leave(int code)
{
	for (;;)
		sys(NR_EXIT_GROUP, code, 0, 0, 0, 0, 0);
}

static void __attribute__((noreturn)) fail(u32 step, u32 err)
{
	u32 report[2] = { step, err };
	sys(NR_WRITE, ERROR_FD, (u64)report, sizeof(report), 0, 0, 0);
	leave(125);
}

static int tolerated(const struct op *o, u32 err)
{
	if (o->flags & F_ANY_ERR)
		return 1;
	return err == o->err[0] || err == o->err[1] || err == o->err[2] || err == o->err[3];
}

/* Returns when there is another program to run. */
static void run(const struct op *ops, u32 count)
{
	u32 last = 0;

	for (u32 pc = 0; pc < count;) {
		const struct op *o = &ops[pc];
		u64 a[6];
		long ret;

		for (int i = 0; i < 6; i++)
			a[i] = (o->regs >> i & 1) ? reg[o->a[i] & 255] : o->a[i];
		pc++;
		switch (o->nr) {
		case OP_FAIL:
			fail(o->step, a[0]);
		case OP_FAIL_LAST:
			fail(o->step, last);
		case OP_NEXT:
			return;
		case OP_STORE32:
			*(u32 *)a[0] = a[1];
			continue;
		}
		ret = sys(o->nr, a[0], a[1], a[2], a[3], a[4], a[5]);
		if (ret < 0 && ret > -4096) {
			if (!tolerated(o, -ret))
				fail(o->step, -ret);
			last = -ret;
			if (o->flags & F_ERR_JUMP)
				pc = o->target;
			continue;
		}
		if (o->save)
			reg[o->save] = ret;
		if (o->flags & F_OK_JUMP)
			pc = o->target;
	}
	leave(0);
}

/* Not under init: the warm-up runs it. */
static void __attribute__((noreturn)) warm(void)
{
	for (u32 i = 0; i < sizeof(text); i += PAGE)
		data[0] += *(const volatile u8 *)&text[i];
	for (u32 i = 0; i < sizeof(bss); i += PAGE)
		bss[i] = data[0];
	while (sys(NR_READ, 0, BASE, MAX, 0, 0, 0) > 0)
		;
	leave(0);
}

/* Reads one program and not a byte more: the next one may be in the pipe already. */
static const struct header *load(void)
{
	const struct header *h = (const struct header *)BASE;
	u64 have = 0, want = sizeof(*h);

	while (have < want) {
		long n = sys(NR_READ, PROGRAM_FD, BASE + have, want - have, 0, 0, 0);

		if (n < 0)
			warm();
		if (n == 0)
			leave(0); /* init does not need us */
		have += n;
		if (have == sizeof(*h)) {
			want = h->size;
			if (h->magic != MAGIC || want < have || want > MAX)
				fail(0, 8);
		}
	}
	return h;
}

void __attribute__((noreturn, used)) entry(void)
{
	sys(NR_PRCTL, SET_TIMERSLACK, TIMERSLACK_NS, 0, 0, 0, 0);
	/* PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS|MAP_NORESERVE */
	if (sys(NR_MMAP, BASE, MAX, 3, 0x4032, -1, 0) != (long)BASE)
		fail(0, 12);
	for (;;) {
		const struct header *h = load();

		run((const struct op *)(BASE + h->entry), h->count);
	}
}

/* The stack pointer is 16-byte aligned at process entry; a call keeps the ABI's promise. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tcall entry\n");
