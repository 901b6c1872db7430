//! What is compared, and what Kvasir is to reach.

/// How a row's measurement is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Work done in a second, at least this many times the better TCG's.
    Times(f64),
    /// A duration, at most the better TCG's divided by this.
    Faster(f64),
    /// Work of two vCPUs beside one, at least this ratio.
    Scaling(f64),
    /// Percent of a host processor, at most.
    Percent(f64),
    /// MiB, at most.
    Mebibytes(f64),
}

/// Which guest a row needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// One vCPU, one after the other in one boot.
    Single,
    /// One vCPU and a disk.
    Disk,
    /// Two vCPUs.
    Dual,
    /// Nothing but the boot to the first userspace line.
    Boot,
    /// A guest that sleeps.
    Idle,
}

/// A line of the comparison.
#[derive(Debug)]
pub struct Row {
    pub name: &'static str,
    pub about: &'static str,
    /// Unit of the work.
    pub unit: &'static str,
    pub goal: Goal,
    pub guest: Guest,
}

const fn rate(name: &'static str, about: &'static str, unit: &'static str, times: f64) -> Row {
    Row { name, about, unit, goal: Goal::Times(times), guest: Guest::Single }
}

/// All rows, in the order of the table. Their programs are in `lab/speed`.
pub const ROWS: &[Row] = &[
    rate("7z-compress", "7-Zip, LZMA2 -mx=1", "run", 2.5),
    rate("7z-decompress", "7-Zip, LZMA2", "run", 2.5),
    rate("gzip-compress", "gzip -6", "run", 2.5),
    rate("gzip-decompress", "gzip -t", "run", 2.5),
    rate("sieve", "sieve of Eratosthenes", "number", 2.5),
    rate("sort", "quicksort", "number", 2.5),
    rate("calls", "recursive function", "call", 4.0),
    rate("bytecode", "bytecode interpreter, computed jumps", "operation", 4.0),
    rate("python", "CPython 3.11, a pure loop", "iteration", 4.0),
    rate("aes-cbc", "openssl speed aes-128-cbc", "B", 8.0),
    rate("aes-gcm", "openssl speed aes-256-gcm", "B", 100.0),
    rate("sha256", "openssl speed sha256", "B", 25.0),
    rate("product-sse2", "matrix product, SSE2", "FLOP", 15.0),
    rate("product-avx2", "matrix product, AVX2", "FLOP", 25.0),
    rate("product-fma", "matrix product, FMA", "FLOP", 300.0),
    rate("product-x87", "matrix product, x87", "FLOP", 30.0),
    rate("nbody", "n-body, scalar double", "step", 12.0),
    rate("triad", "STREAM triad, 48 MiB", "B", 5.0),
    rate("memcpy-16m", "memcpy of 16 MiB", "B", 3.0),
    rate("memcpy-4k", "memcpy of 4 KiB in cache", "B", 30.0),
    rate("pointer-chase", "dependent loads, 2 MiB", "load", 1.3),
    rate("getpid", "system call", "call", 2.0),
    rate("fork-exec", "fork, exec, exit, wait", "process", 3.0),
    rate("pipe", "pipe ping-pong", "round trip", 4.0),
    rate("mmap-touch", "mmap, touch, munmap", "page", 3.0),
    rate("self-patching", "code that patches itself between calls", "call", 3.0),
    Row {
        name: "disk-4k",
        about: "virtio-blk 4 KiB random read, depth 32",
        unit: "read",
        goal: Goal::Times(4.0),
        guest: Guest::Disk,
    },
    Row {
        name: "threads",
        about: "2 vCPUs with two busy threads, of one thread",
        unit: "times",
        goal: Goal::Scaling(1.9),
        guest: Guest::Dual,
    },
    Row {
        name: "boot",
        about: "q35, Debian cloud kernel to the first userspace line",
        unit: "s",
        goal: Goal::Faster(2.5),
        guest: Guest::Boot,
    },
    Row {
        name: "boot-microvm",
        about: "microvm, the same",
        unit: "s",
        goal: Goal::Faster(2.5),
        guest: Guest::Boot,
    },
    Row {
        name: "idle",
        about: "idle guest, host processor",
        unit: "%",
        goal: Goal::Percent(1.0),
        guest: Guest::Idle,
    },
    Row {
        name: "memory",
        about: "idle guest, resident memory beyond the guest's",
        unit: "MiB",
        goal: Goal::Mebibytes(60.0),
        guest: Guest::Idle,
    },
];

/// The rows asked for: all, or those whose name is or starts with one of `only`.
///
/// # Errors
/// A name that no row has.
pub fn select(only: &[String]) -> anyhow::Result<Vec<&'static Row>> {
    let matches = |row: &Row, name: &str| row.name == name || row.name.starts_with(&format!("{name}-"));
    for name in only {
        anyhow::ensure!(
            ROWS.iter().any(|row| matches(row, name)),
            "no row '{name}'; the rows are: {}",
            ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(" ")
        );
    }
    Ok(ROWS.iter().filter(|row| only.is_empty() || only.iter().any(|name| matches(row, name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_selected_by_name_and_family() {
        assert_eq!(select(&[]).expect("all").len(), ROWS.len());
        let names = |only: &[&str]| -> Vec<&str> {
            let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
            select(&only).expect("rows").iter().map(|row| row.name).collect()
        };
        assert_eq!(names(&["aes"]), ["aes-cbc", "aes-gcm"]);
        assert_eq!(names(&["sort", "boot"]), ["sort", "boot", "boot-microvm"]);
        assert!(select(&["nonsense".into()]).is_err());
    }
}
