//! Counters summed over vCPUs, as rows for `--stats`.

use crate::state::Stats;

/// A sum.
#[derive(Debug, Default)]
pub struct Sum {
    retired: u64,
    stats: Stats,
}

macro_rules! rows {
    ($($field:ident => $name:literal),* $(,)?) => {
        impl Sum {
            /// Adds a vCPU's counters.
            pub fn add(&mut self, retired: u64, s: &Stats) {
                self.retired += retired;
                $(self.stats.$field += s.$field;)*
            }

            /// Names and values.
            pub fn rows(&self) -> Vec<(String, u64)> {
                let mut rows = vec![("instructions".to_owned(), self.retired)];
                $(rows.push(($name.to_owned(), self.stats.$field));)*
                rows
            }
        }
    };
}

rows! {
    blocks_decoded => "blocks decoded",
    ops_decoded => "operations decoded",
    blocks_dropped => "blocks dropped",
    cache_flushes => "block cache flushes",
    jump_misses => "jump cache misses",
    tlb_fills => "TLB misses",
    tlb_flushes => "TLB flushes",
    page_faults => "page faults",
    exceptions => "exceptions",
    interrupts => "interrupts",
    mmio => "exits: device memory",
    ports => "exits: ports",
    apic => "exits: local APIC",
    halts => "exits: HLT",
    code_writes => "writes to code pages",
    msrs => "MSR accesses",
    cpuids => "CPUID",
    native_blocks => "translator: blocks",
    native_instructions => "translator: guest instructions translated",
    native_bytes => "translator: bytes of code",
    native_flushes => "translator: cache flushes",
    native_dropped => "translator: blocks dropped",
    native_unlinked => "translator: links undone",
    native_entries => "translator: entries",
    native_exit_link => "translator: exits, unlinked branch",
    native_exit_lookup => "translator: exits, computed branch",
    native_exit_at => "translator: exits, instruction for the interpreter",
    native_exit_poll => "translator: exits, signals",
    native_exit_slow => "translator: exits from slow paths",
    native_refills => "translator: TLB refills",
    native_interpreted => "translator: instructions interpreted within blocks",
}
