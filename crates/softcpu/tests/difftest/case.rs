//! What is run: one or a few instructions, with registers and memory before and after.

/// Linear address of the page that code runs in. It is filled with INT3 around the instructions.
pub const CODE: u64 = 0x1000_0000;
/// Linear address of two writable pages, followed by a read-only one. Nothing is mapped around them.
pub const DATA: u64 = 0x2000_0000;
/// Length of the writable pages.
pub const DATA_LEN: usize = 0x2000;
/// Linear address of the read-only page.
pub const READ_ONLY: u64 = DATA + DATA_LEN as u64;
/// Length of the read-only page.
pub const READ_ONLY_LEN: usize = 0x1000;
/// Base of the GS segment.
pub const GS_BASE: u64 = DATA + 0x1800;
/// Selectors of user code and stack, as Linux has them.
pub const USER_CS: u16 = 0x33;
pub const USER_SS: u16 = 0x2b;
/// Selector of 32-bit user code.
pub const USER32_CS: u16 = 0x23;
/// Number of memory patterns to start from.
pub const PATTERNS: usize = 64;
/// Most bytes of code in a case.
pub const CODE_MAX: usize = 64;
/// Most bytes of memory set apart from the pattern.
pub const PATCH_MAX: usize = 832;

/// Registers.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Regs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub vec: [[u8; 32]; 16],
    pub st: [[u8; 10]; 8],
    pub fip: u64,
    pub fdp: u64,
    pub mxcsr: u32,
    pub fcw: u16,
    pub fsw: u16,
    pub fop: u16,
    /// Abridged tag word.
    pub ftw: u16,
    /// Selectors of ES, SS, DS.
    pub segments: [u16; 3],
}

impl Regs {
    /// All zero but for what must not be.
    pub fn plain() -> Self {
        Self {
            gpr: [0; 16],
            rip: CODE,
            rflags: 0x202,
            vec: [[0; 32]; 16],
            st: [[0; 10]; 8],
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            fcw: 0x37f,
            fsw: 0,
            fop: 0,
            ftw: 0,
            segments: [USER_SS; 3],
        }
    }
}

/// Before.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Case {
    /// Instructions; INT3 follows.
    pub code: [u8; CODE_MAX],
    pub code_len: u32,
    /// 64, or 32 or 16 for compatibility mode.
    pub bits: u32,
    /// Offset in the code page.
    pub entry: u32,
    pub regs: Regs,
    /// Which pattern memory starts from.
    pub pattern: u32,
    pub patch_at: u32,
    pub patch_len: u32,
    pub patch: [u8; PATCH_MAX],
    /// Flags that are undefined afterwards, as in RFLAGS.
    pub undefined: u32,
    /// Bytes of memory (offset in the data pages, length) that may differ.
    pub ignore: [(u32, u32); 8],
}

impl Case {
    pub fn new() -> Self {
        Self {
            code: [0xcc; CODE_MAX],
            code_len: 0,
            bits: 64,
            entry: 0,
            regs: Regs::plain(),
            pattern: 0,
            patch_at: 0,
            patch_len: 0,
            patch: [0; PATCH_MAX],
            undefined: 0,
            ignore: [(0, 0); 8],
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.code[..self.code_len as usize]
    }

    /// Selector of its code.
    pub fn cs(&self) -> u16 {
        match self.bits {
            64 => USER_CS,
            32 => USER32_CS,
            _ => crate::segments::CODE16,
        }
    }

    /// Instruction pointer of the start of the code page.
    pub fn code_base(&self) -> u64 {
        if self.bits == 16 { 0 } else { CODE }
    }

    /// Memory at `at` (offset in the data pages) as the case finds it.
    pub fn memory(&self, patterns: &Patterns, at: usize, out: &mut [u8]) {
        let mut all = *patterns.get(self.pattern);
        self.apply_patch(&mut all);
        for (i, b) in out.iter_mut().enumerate() {
            *b = all.get(at + i).copied().unwrap_or(0);
        }
    }

    pub fn apply_patch(&self, data: &mut [u8; DATA_LEN]) {
        let (at, len) = (self.patch_at as usize, self.patch_len as usize);
        for (i, b) in self.patch[..len].iter().enumerate() {
            if let Some(d) = data.get_mut(at + i) {
                *d = *b;
            }
        }
    }
}

/// After.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    pub regs: Regs,
    /// Exception that ended the case: 3 if it ran into the INT3 behind it.
    pub vector: u32,
    /// Error code, of exceptions that have one.
    pub error: u32,
    /// Page-fault address, of page faults.
    pub cr2: u64,
    pub data: [u8; DATA_LEN],
}

/// Memory contents to start from.
pub struct Patterns(Box<[[u8; DATA_LEN]]>);

impl Patterns {
    pub fn new(rng: &mut crate::rng::Rng) -> Self {
        let mut all = vec![[0; DATA_LEN]; PATTERNS];
        // The first stays zero, for shrinking.
        for page in &mut all[1..] {
            for chunk in page.chunks_exact_mut(8) {
                chunk.copy_from_slice(&rng.lane().to_le_bytes());
            }
        }
        Self(all.into())
    }

    pub fn get(&self, n: u32) -> &[u8; DATA_LEN] {
        &self.0[n as usize % PATTERNS]
    }
}

/// Something that runs cases.
pub trait Executor {
    /// Name, for reports.
    fn name(&self) -> &'static str;
    /// Runs cases; one outcome for each. `None`: the executor broke down on it, with the reason printed.
    fn run(&mut self, cases: &[Case]) -> Vec<Option<Box<Outcome>>>;
}

/// Whether an exception has an error code.
pub fn has_error(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}
