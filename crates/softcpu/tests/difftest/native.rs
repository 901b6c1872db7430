//! The processor itself: a child process whose signal handler loads the registers of a case, and gets control back
//! when the case ends in a trap or fault.
#![allow(unsafe_code)] // runs arbitrary instructions, in a process of their own

use crate::case::*;
use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering};

/// Cases handed over at a time.
const BATCH: usize = 64;
/// How long a batch may take, in milliseconds.
const TIMEOUT: i32 = 20_000;
/// Magic number of an extended frame (uapi/asm/sigcontext.h, FP_XSTATE_MAGIC1).
const EXTENDED_MAGIC: u32 = 0x4650_5853;

/// What parent and child share.
#[repr(C)]
struct Shared {
    count: AtomicU32,
    current: AtomicU32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The executor.
pub struct Native<'a> {
    patterns: &'a Patterns,
    shared: *mut Shared,
    child: Option<Child>,
}

struct Child {
    pid: i32,
    to: i32,
    from: i32,
}

impl<'a> Native<'a> {
    pub fn new(patterns: &'a Patterns) -> Self {
        let shared =
            map(std::ptr::null_mut(), size_of::<Shared>(), libc::PROT_READ | libc::PROT_WRITE, 0, -1);
        Self { patterns, shared: shared.cast(), child: None }
    }

    fn child(&mut self) -> &Child {
        let (patterns, shared) = (self.patterns, self.shared);
        self.child.get_or_insert_with(|| spawn(patterns, shared))
    }

    /// Runs at most a batch. Returns how many cases were finished.
    fn run_batch(&mut self, cases: &[Case]) -> usize {
        let shared = self.shared;
        let (to, from) = {
            let c = self.child();
            (c.to, c.from)
        };
        // SAFETY: the child only touches the shared memory between the byte we send and the one it answers with.
        unsafe {
            std::ptr::copy_nonoverlapping(cases.as_ptr(), (&raw mut (*shared).cases).cast(), cases.len());
            (*shared).count.store(cases.len() as u32, Ordering::SeqCst);
            (*shared).current.store(0, Ordering::SeqCst);
        }
        let mut byte = [0u8];
        let mut poll = libc::pollfd { fd: from, events: libc::POLLIN, revents: 0 };
        // SAFETY: plain system calls on our own descriptors and buffers.
        let answered = unsafe {
            libc::write(to, byte.as_ptr().cast(), 1) == 1
                && libc::poll(&mut poll, 1, TIMEOUT) == 1
                && libc::read(from, byte.as_mut_ptr().cast(), 1) == 1
        };
        if answered {
            return cases.len();
        }
        self.stop();
        // SAFETY: the child is gone.
        unsafe { (*shared).current.load(Ordering::SeqCst) as usize }
    }

    fn stop(&mut self) {
        if let Some(c) = self.child.take() {
            let mut status = 0;
            // SAFETY: our own child and descriptors.
            unsafe {
                libc::kill(c.pid, libc::SIGKILL);
                libc::waitpid(c.pid, &mut status, 0);
                libc::close(c.to);
                libc::close(c.from);
            }
        }
    }
}

impl Drop for Native<'_> {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

impl Executor for Native<'_> {
    fn name(&self) -> &'static str {
        "native"
    }

    fn run(&mut self, cases: &[Case]) -> Vec<Option<Box<Outcome>>> {
        let mut out = Vec::with_capacity(cases.len());
        let mut left = cases;
        while !left.is_empty() {
            let n = left.len().min(BATCH);
            let done = self.run_batch(&left[..n]);
            for i in 0..done {
                // SAFETY: the child has finished these.
                out.push(Some(Box::new(unsafe { (*self.shared).outcomes[i] })));
            }
            if done < n {
                eprintln!("native execution broke down on {:02x?}", left[done].bytes());
                out.push(None);
                left = &left[done + 1..];
            } else {
                left = &left[n..];
            }
        }
        out
    }
}

fn map(at: *mut u8, len: usize, protection: i32, flags: i32, fd: i32) -> *mut u8 {
    let base = if fd < 0 { libc::MAP_SHARED | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: a new mapping; with an address, only where nothing is yet.
    let p = unsafe { libc::mmap(at.cast(), len, protection, base | flags, fd, 0) };
    assert!(p != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    p.cast()
}

fn spawn(patterns: &Patterns, shared: *mut Shared) -> Child {
    let (mut down, mut up) = ([0; 2], [0; 2]);
    // SAFETY: the arrays have room for two descriptors each.
    let made = unsafe {
        libc::pipe2(down.as_mut_ptr(), libc::O_CLOEXEC) + libc::pipe2(up.as_mut_ptr(), libc::O_CLOEXEC)
    };
    assert_eq!(made, 0, "pipe2: {}", std::io::Error::last_os_error());
    // SAFETY: everything the child needs is made before the fork, and it only makes system calls and copies.
    let worker = unsafe { Worker::prepare(patterns, shared) };
    // SAFETY: as above; the child never returns.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: we are the child.
        unsafe {
            libc::close(down[1]);
            libc::close(up[0]);
            work(worker, down[0], up[1])
        }
    }
    assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
    // SAFETY: the child has its own copies.
    unsafe {
        libc::close(down[0]);
        libc::close(up[1]);
        worker.release();
    }
    Child { pid, to: down[1], from: up[0] }
}

/// State of the child.
struct Worker {
    shared: *mut Shared,
    patterns: *const Patterns,
    code_fd: i32,
    /// The code page, writable.
    code: *mut u8,
    running: bool,
    index: usize,
    /// Where the code page was last written: offset and length.
    written: (usize, usize),
    /// Context to go back to after the batch.
    gregs: [i64; 23],
    fp: [u8; 16384],
    fp_len: usize,
}

/// The child's state, for its signal handler.
static WORKER: std::sync::atomic::AtomicPtr<Worker> = std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

#[derive(Clone, Copy)]
struct WorkerPtr(*mut Worker);

impl Worker {
    unsafe fn prepare(patterns: &Patterns, shared: *mut Shared) -> WorkerPtr {
        // SAFETY: the name is a literal; the file is sized before it is mapped.
        let fd = unsafe { libc::memfd_create(c"difftest-code".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: our own descriptor.
        let sized = unsafe { libc::ftruncate(fd, 4096) } == 0;
        assert!(fd >= 0 && sized, "memfd: {}", std::io::Error::last_os_error());
        let code = map(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, 0, fd);
        // SAFETY: just mapped.
        unsafe { std::ptr::write_bytes(code, 0xcc, 4096) };
        WorkerPtr(Box::into_raw(Box::new(Worker {
            shared,
            patterns,
            code_fd: fd,
            code,
            running: false,
            index: 0,
            written: (0, 0),
            gregs: [0; 23],
            fp: [0; 16384],
            fp_len: 0,
        })))
    }
}

impl WorkerPtr {
    /// In the parent, after the fork.
    unsafe fn release(self) {
        // SAFETY: made by `prepare`, used by nobody else.
        unsafe {
            let w = Box::from_raw(self.0);
            libc::munmap(w.code.cast(), 4096);
            libc::close(w.code_fd);
        }
    }
}

fn must(ok: bool) {
    if !ok {
        // SAFETY: always.
        unsafe { libc::_exit(99) }
    }
}

/// The child.
unsafe fn work(worker: WorkerPtr, from: i32, to: i32) -> ! {
    // SAFETY: single-threaded; every address is checked to be free before it is mapped.
    unsafe {
        let w = worker.0;
        WORKER.store(w, Ordering::SeqCst);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        let fixed = libc::MAP_FIXED_NOREPLACE;
        let code = libc::mmap(
            CODE as *mut _,
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_SHARED | fixed,
            (*w).code_fd,
            0,
        );
        must(code as u64 == CODE);
        let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let data = libc::mmap(DATA as *mut _, DATA_LEN + READ_ONLY_LEN, rw, anon, -1, 0);
        must(data as u64 == DATA);
        let pattern: *const u8 = (*(*w).patterns).get(1).as_ptr();
        std::ptr::copy_nonoverlapping(pattern, READ_ONLY as *mut u8, READ_ONLY_LEN);
        must(libc::mprotect(READ_ONLY as *mut _, READ_ONLY_LEN, libc::PROT_READ) == 0);
        const ARCH_SET_GS: i32 = 0x1001;
        must(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE) == 0);
        for (n, descriptor) in crate::segments::LDT.iter().enumerate() {
            let description = descriptor.user_desc(n as u32);
            // In the form that takes all bits as given.
            must(libc::syscall(libc::SYS_modify_ldt, 0x11, &description, 16) == 0);
        }
        let stack =
            libc::mmap(std::ptr::null_mut(), 1 << 17, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        must(stack != libc::MAP_FAILED);
        let alt = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: 1 << 17 };
        must(libc::sigaltstack(&alt, std::ptr::null_mut()) == 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            must(libc::sigaction(signal, &action, std::ptr::null_mut()) == 0);
        }
        loop {
            let mut byte = [0u8];
            if libc::read(from, byte.as_mut_ptr().cast(), 1) != 1 {
                libc::_exit(0);
            }
            if (*(*w).shared).count.load(Ordering::SeqCst) > 0 {
                // The handler runs the whole batch before it comes back here.
                asm!("int3");
            }
            must(libc::write(to, byte.as_ptr().cast(), 1) == 1);
        }
    }
}

/// Order of Linux's `gregs` for our register numbers.
const GREG: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
const RIP: usize = 16;
const EFLAGS: usize = 17;
/// CS, GS, FS and SS, 16 bits each.
const SELECTORS: usize = 18;
const ERR: usize = 19;
const TRAPNO: usize = 20;
const CR2: usize = 22;

unsafe extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's frame; the worker was set before the handler was installed.
    unsafe {
        let w = &mut *WORKER.load(Ordering::SeqCst);
        let context = &mut *context.cast::<libc::ucontext_t>();
        let gregs = &mut context.uc_mcontext.gregs;
        let fp = context.uc_mcontext.fpregs.cast::<u8>();
        let shared = &mut *w.shared;
        if w.running {
            capture(&mut shared.outcomes[w.index], gregs, fp);
            w.index += 1;
        } else {
            w.gregs = *gregs;
            w.fp_len = frame_len(fp).min(w.fp.len());
            std::ptr::copy_nonoverlapping(fp, w.fp.as_mut_ptr(), w.fp_len);
            w.running = true;
            w.index = 0;
        }
        shared.current.store(w.index as u32, Ordering::SeqCst);
        if w.index < shared.count.load(Ordering::SeqCst) as usize {
            prepare(w, &shared.cases[w.index], gregs, fp);
        } else {
            w.running = false;
            *gregs = w.gregs;
            std::ptr::copy_nonoverlapping(w.fp.as_ptr(), fp, w.fp_len);
        }
    }
}

/// Length of the floating-point frame.
unsafe fn frame_len(fp: *const u8) -> usize {
    // SAFETY: the software-reserved bytes of the legacy region.
    unsafe {
        let magic = fp.add(464).cast::<u32>().read_unaligned();
        if magic == EXTENDED_MAGIC { fp.add(468).cast::<u32>().read_unaligned() as usize } else { 512 }
    }
}

unsafe fn has_extended(fp: *const u8) -> bool {
    // SAFETY: as above.
    unsafe { fp.add(464).cast::<u32>().read_unaligned() == EXTENDED_MAGIC }
}

/// Loads a case into the context that the handler returns to.
unsafe fn prepare(w: &mut Worker, case: &Case, gregs: &mut [i64; 23], fp: *mut u8) {
    let r = &case.regs;
    // SAFETY: offsets are those of the FXSAVE and standard XSAVE formats; memory was mapped by `work`.
    unsafe {
        std::ptr::write_bytes(w.code.add(w.written.0), 0xcc, w.written.1);
        let (at, len) = (case.entry as usize, case.code_len as usize);
        std::ptr::copy_nonoverlapping(case.code.as_ptr(), w.code.add(at), len);
        w.written = (at, len);
        let data = &mut *(DATA as *mut [u8; DATA_LEN]);
        *data = *(*w.patterns).get(case.pattern);
        case.apply_patch(data);
        for (n, g) in GREG.iter().enumerate() {
            gregs[*g] = r.gpr[n] as i64;
        }
        gregs[RIP] = r.rip as i64;
        gregs[EFLAGS] = r.rflags as i64;
        let [es, ss, ds] = r.segments;
        gregs[SELECTORS] = gregs[SELECTORS] & 0xffff_ffff_0000 | i64::from(case.cs()) | i64::from(ss) << 48;
        asm!("mov es, {0:e}", "mov ds, {1:e}", in(reg) u32::from(es), in(reg) u32::from(ds),
            options(nostack, preserves_flags));
        let put16 = |at: usize, v: u16| fp.add(at).cast::<u16>().write_unaligned(v);
        put16(0, r.fcw);
        put16(2, r.fsw);
        put16(4, r.ftw);
        put16(6, r.fop);
        fp.add(8).cast::<u64>().write_unaligned(r.fip);
        fp.add(16).cast::<u64>().write_unaligned(r.fdp);
        fp.add(24).cast::<u32>().write_unaligned(r.mxcsr);
        for (i, st) in r.st.iter().enumerate() {
            std::ptr::copy_nonoverlapping(st.as_ptr(), fp.add(32 + 16 * i), 10);
        }
        for (i, v) in r.vec.iter().enumerate() {
            std::ptr::copy_nonoverlapping(v.as_ptr(), fp.add(160 + 16 * i), 16);
            if has_extended(fp) {
                std::ptr::copy_nonoverlapping(v.as_ptr().add(16), fp.add(576 + 16 * i), 16);
            }
        }
        if has_extended(fp) {
            let bv = fp.add(512).cast::<u64>();
            bv.write_unaligned(bv.read_unaligned() | 7);
        }
    }
}

/// Reads what a case left.
unsafe fn capture(out: &mut Outcome, gregs: &[i64; 23], fp: *const u8) {
    // SAFETY: as in `prepare`.
    unsafe {
        let bv = if has_extended(fp) { fp.add(512).cast::<u64>().read_unaligned() } else { 3 };
        let r = &mut out.regs;
        for (n, g) in GREG.iter().enumerate() {
            r.gpr[n] = gregs[*g] as u64;
        }
        r.rip = gregs[RIP] as u64;
        r.rflags = gregs[EFLAGS] as u64;
        let (es, ds): (u32, u32);
        asm!("mov {0:e}, es", "mov {1:e}, ds", out(reg) es, out(reg) ds, options(nostack, preserves_flags));
        r.segments = [es as u16, (gregs[SELECTORS] as u64 >> 48) as u16, ds as u16];
        out.vector = gregs[TRAPNO] as u32;
        out.error = if has_error(out.vector) { gregs[ERR] as u32 } else { 0 };
        out.cr2 = if out.vector == 14 { gregs[CR2] as u64 } else { 0 };
        r.mxcsr = fp.add(24).cast::<u32>().read_unaligned();
        if bv & 1 != 0 {
            let get16 = |at: usize| fp.add(at).cast::<u16>().read_unaligned();
            (r.fcw, r.fsw, r.ftw, r.fop) = (get16(0), get16(2), get16(4) & 0xff, get16(6));
            r.fip = fp.add(8).cast::<u64>().read_unaligned();
            r.fdp = fp.add(16).cast::<u64>().read_unaligned();
            for (i, st) in r.st.iter_mut().enumerate() {
                std::ptr::copy_nonoverlapping(fp.add(32 + 16 * i), st.as_mut_ptr(), 10);
            }
        } else {
            let plain = Regs::plain();
            (r.fcw, r.fsw, r.ftw, r.fop, r.fip, r.fdp, r.st) =
                (plain.fcw, plain.fsw, plain.ftw, plain.fop, plain.fip, plain.fdp, plain.st);
        }
        for (i, v) in r.vec.iter_mut().enumerate() {
            *v = [0; 32];
            if bv & 2 != 0 {
                std::ptr::copy_nonoverlapping(fp.add(160 + 16 * i), v.as_mut_ptr(), 16);
            }
            if bv & 4 != 0 {
                std::ptr::copy_nonoverlapping(fp.add(576 + 16 * i), v.as_mut_ptr().add(16), 16);
            }
        }
        out.data = *(DATA as *const [u8; DATA_LEN]);
    }
}
