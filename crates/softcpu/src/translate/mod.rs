//! The translator: hot 64-bit guest code as host code, instruction for instruction where possible.
//!
//! * `layout`: where guest state is while translated code runs.
//! * `asm`: emitter for the code around guest instructions.
//! * `scan`: finds the instructions of a block, and which flags are live where.
//! * `emit`, `operand`, `memory`, `group`, `stack`, `special`, `system`, `branch`: code for a block.
//! * `cache`: the code cache: blocks, links between them, look-up, invalidation.
//! * `stubs`: the fixed pieces of code that every block uses.
//! * `run`: in and out of translated code, and what its slow paths call.
//!
//! The design and its reasons are in `docs/translator.md`.

mod asm;
mod branch;
mod cache;
mod emit;
mod group;
mod layout;
mod memory;
mod operand;
mod run;
mod scan;
mod special;
mod stack;
mod stubs;
mod system;

pub use cache::{LEAST, MOST, Translator};

/// Executions of a block by the interpreter before it is translated.
pub const HOT: u32 = 24;
/// Value of a block's heat that says that it cannot be translated.
pub const FROZEN: u32 = u32::MAX;

/// What generated code and its slow paths tell each other; part of the vCPU, reached through the GS base.
#[repr(C)]
#[derive(Debug)]
pub struct State {
    /// RSP of the host when translated code was entered.
    pub host_rsp: u64,
    /// RSP of the host while a slow path runs.
    pub saved_rsp: u64,
    /// Where a slow path continues.
    pub target: u64,
    /// Key of valid entries in the jump table and in cross-page links.
    pub key: u64,
    /// Executions of a block before it is translated; [`FROZEN`]: none is.
    pub hot: u32,
    /// The jump table.
    pub jumps: *const cache::Jump,
    /// The host's vector registers hold the guest's: 0 no, 1 yes and SSE may be used, 2 AVX too.
    pub vectors: u8,
    /// Argument of a slow path or exit.
    pub argument: u64,
    /// Linear address of the access that takes the slow path.
    pub linear: u64,
    /// Address of the vCPU itself.
    pub me: u64,
    /// The host stack holds return addresses down to here.
    pub depth_limit: u64,
    /// A value kept over an address check.
    pub spill: [u64; 2],
    /// What the run loop is to do ([`crate::op::Next`]).
    pub next: usize,
    /// Where code continues after the host's stack was emptied.
    pub fresh: u64,
    /// What is at the bottom of the host's stack: the address of the look-up for returns that nothing foresaw.
    pub base_return: u64,
    /// Site of the branch whose target is looked up.
    pub branch: u64,
    /// Linear address of the page that the stack was found writable in; [`NO_STACK`] if that is no longer known.
    pub stack_page: u64,
    /// Host address minus linear address of that page.
    pub stack_addend: u64,
    /// Host address minus linear address of the page that a group of accesses is in.
    pub group: u64,
    /// What is reached through [`NO_STACK`], so that nothing else can be.
    dummy: Box<[u64; 520]>,
}

/// A page in the hole of non-canonical addresses that no program comes upon: while no page is known, an access there
/// reaches the dummy instead of faulting, so it must not be one that programs try, as 1 << 63 is.
const NO_STACK: u64 = 0x9a3f_5c71_28e4_d000;

impl State {
    /// The page that the stack is in may have lost its translation.
    #[inline]
    pub fn forget_stack(&mut self) {
        self.stack_page = NO_STACK;
        self.stack_addend = (self.dummy.as_ptr() as u64).wrapping_sub(NO_STACK);
    }
}

impl Default for State {
    fn default() -> Self {
        let mut state = Self {
            host_rsp: 0,
            saved_rsp: 0,
            target: 0,
            key: 0,
            hot: FROZEN,
            jumps: std::ptr::null(),
            vectors: 0,
            argument: 0,
            linear: 0,
            me: 0,
            depth_limit: 0,
            spill: [0; 2],
            next: 0,
            fresh: 0,
            base_return: 0,
            branch: 0,
            stack_page: 0,
            stack_addend: 0,
            group: 0,
            dummy: Box::new([0; 520]),
        };
        state.forget_stack();
        state
    }
}

/// Counters of a translator.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub blocks: u64,
    pub instructions: u64,
    pub bytes: u64,
    pub flushes: u64,
    pub dropped: u64,
    pub entries: u64,
    pub exit_link: u64,
    pub exit_lookup: u64,
    pub exit_at: u64,
    pub exit_poll: u64,
    pub exit_slow: u64,
    pub refills: u64,
    pub interpreted: u64,
    pub unlinked: u64,
}

impl Counters {
    /// Copies them to where the vCPU's other counters are.
    pub fn publish(&self, s: &mut crate::state::Stats) {
        s.native_blocks = self.blocks;
        s.native_instructions = self.instructions;
        s.native_bytes = self.bytes;
        s.native_flushes = self.flushes;
        s.native_dropped = self.dropped;
        s.native_unlinked = self.unlinked;
        s.native_entries = self.entries;
        s.native_exit_link = self.exit_link;
        s.native_exit_lookup = self.exit_lookup;
        s.native_exit_at = self.exit_at;
        s.native_exit_poll = self.exit_poll;
        s.native_exit_slow = self.exit_slow;
        s.native_refills = self.refills;
        s.native_interpreted = self.interpreted;
    }
}
