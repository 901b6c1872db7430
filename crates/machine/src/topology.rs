//! Sockets, dies, cores, threads, and the APIC IDs and CPUID leaves that show them.

use accel::Cpuid;
use schemars::JsonSchema;
use serde::Deserialize;

/// Most vCPUs a machine may have.
pub const MAX_VCPUS: u32 = 64;

/// `--cpus N[,sockets=,dies=,cores=,threads=]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct SmpSpec {
    /// Number of vCPUs.
    pub cpus: Option<u32>,
    /// Number of sockets.
    pub sockets: Option<u32>,
    /// Dies in a socket.
    pub dies: Option<u32>,
    /// Cores in a die.
    pub cores: Option<u32>,
    /// Threads of a core.
    pub threads: Option<u32>,
}

/// A complete topology; the vCPUs are the product of its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Number of sockets.
    pub sockets: u32,
    /// Dies in a socket.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self::flat(1)
    }
}

fn width(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

impl Topology {
    /// One socket of `cpus` single-threaded cores.
    pub fn flat(cpus: u32) -> Self {
        Self { sockets: 1, dies: 1, cores: cpus, threads: 1 }
    }

    /// Fills in what the user left out, as QEMU does since 6.2: missing members are 1, and if `cpus` is given the
    /// first missing of cores, sockets, threads makes up the number.
    ///
    /// # Errors
    /// Zeroes, a product that is not `cpus`, or more than [`MAX_VCPUS`].
    pub fn new(spec: &SmpSpec) -> Result<Self, String> {
        for (name, value) in [
            ("cpus", spec.cpus),
            ("sockets", spec.sockets),
            ("dies", spec.dies),
            ("cores", spec.cores),
            ("threads", spec.threads),
        ] {
            if value == Some(0) {
                return Err(format!("invalid CPU topology: {name} must be at least 1"));
            }
            if value.is_some_and(|v| v > MAX_VCPUS) {
                return Err(format!(
                    "{name}={} is more than supported; the maximum is {MAX_VCPUS} vCPUs",
                    value.unwrap_or(0)
                ));
            }
        }
        let known = spec.sockets.unwrap_or(1)
            * spec.dies.unwrap_or(1)
            * spec.cores.unwrap_or(1)
            * spec.threads.unwrap_or(1);
        let cpus = spec.cpus.unwrap_or(known);
        let rest = cpus / known.max(1);
        let mut t = Self {
            sockets: spec.sockets.unwrap_or(1),
            dies: spec.dies.unwrap_or(1),
            cores: spec.cores.unwrap_or(1),
            threads: spec.threads.unwrap_or(1),
        };
        match (spec.cores, spec.sockets, spec.threads) {
            (None, _, _) => t.cores = rest.max(1),
            (_, None, _) => t.sockets = rest.max(1),
            (_, _, None) => t.threads = rest.max(1),
            _ => {}
        }
        if t.count() != cpus {
            return Err(format!(
                "invalid CPU topology: sockets ({}) * dies ({}) * cores ({}) * threads ({}) is {}, not cpus ({cpus})",
                t.sockets,
                t.dies,
                t.cores,
                t.threads,
                t.count()
            ));
        }
        if cpus > MAX_VCPUS {
            return Err(format!("cpus={cpus} is more than supported; the maximum is {MAX_VCPUS}"));
        }
        Ok(t)
    }

    /// Number of vCPUs.
    pub fn count(&self) -> u32 {
        self.sockets * self.dies * self.cores * self.threads
    }

    /// APIC ID of vCPU `index`: bit fields for thread, core, die and socket (Intel SDM vol. 3, 9.9.1).
    pub fn apic_id(&self, index: u32) -> u32 {
        let (thread, rest) = (index % self.threads, index / self.threads);
        let (core, rest) = (rest % self.cores, rest / self.cores);
        let (die, socket) = (rest % self.dies, rest / self.dies);
        let core_shift = width(self.threads);
        let die_shift = core_shift + width(self.cores);
        thread | core << core_shift | die << die_shift | socket << self.package_shift()
    }

    fn package_shift(&self) -> u32 {
        width(self.threads) + width(self.cores) + width(self.dies)
    }

    /// APIC IDs in vCPU order.
    pub fn apic_ids(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.count()).map(|i| self.apic_id(i))
    }

    /// An extended topology leaf: (type of level, bits of the APIC ID below the next level, logical processors).
    fn fill_levels(&self, cpuid: &mut Cpuid, leaf: u32, max: u32, id: u32, levels: &[(u32, u32, u32)]) {
        cpuid.remove(leaf);
        if leaf > max {
            return;
        }
        for (subleaf, (kind, shift, count)) in levels.iter().enumerate() {
            let e = cpuid.entry(leaf, subleaf as u32, true);
            (e.eax, e.ebx, e.ecx, e.edx) = (*shift, *count, kind << 8 | subleaf as u32, id);
        }
        let end = levels.len() as u32;
        let e = cpuid.entry(leaf, end, true);
        (e.ecx, e.edx) = (end, id);
    }

    /// Fills the topology leaves of vCPU `index` into a CPUID table: 1, 4, 0xb, 0x1f, 0x8000_0008, 0x8000_001d,
    /// 0x8000_001e (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E).
    pub fn fill_cpuid(&self, cpuid: &mut Cpuid, index: u32) {
        let id = self.apic_id(index);
        let per_package = self.dies * self.cores * self.threads;
        let amd = cpuid.query(0, 0)[1] == u32::from_le_bytes(*b"Auth");
        let one = cpuid.entry(1, 0, false);
        let family = (one.eax >> 8 & 15) + (one.eax >> 20 & 0xff);
        one.ebx = (one.ebx & 0xffff) | (per_package.min(255) << 16) | (id & 0xff) << 24;
        const HTT: u32 = 1 << 28;
        one.edx = if per_package > 1 { one.edx | HTT } else { one.edx & !HTT };

        for entry in &mut cpuid.entries {
            // Cache leaves: how many logical processors share each level.
            let level = entry.eax >> 5 & 7;
            let die = width(self.threads) + width(self.cores);
            let sharing = if level >= 3 { die } else { width(self.threads) };
            if (entry.leaf == 4 || entry.leaf == 0x8000_001d) && entry.eax & 0x1f != 0 {
                entry.eax = (entry.eax & 0x3fff) | ((1 << sharing) - 1) << 14;
                if entry.leaf == 4 {
                    entry.eax |= ((1 << (self.package_shift() - width(self.threads))) - 1) << 26;
                }
            }
        }

        // Dies are visible in leaf 0x1f alone.
        let max = &mut cpuid.entry(0, 0, false).eax;
        if self.dies > 1 && *max >= 0xb {
            *max = (*max).max(0x1f);
        }
        let max = *max;
        let package = (self.package_shift(), per_package);
        let (smt, core, die) = (1u32, 2, 5);
        let thread = (smt, width(self.threads), self.threads);
        let in_die = (core, width(self.threads) + width(self.cores), self.threads * self.cores);
        self.fill_levels(cpuid, 0xb, max, id, &[thread, (core, package.0, package.1)]);
        match self.dies {
            1 => self.fill_levels(cpuid, 0x1f, max, id, &[thread, in_die]),
            _ => self.fill_levels(cpuid, 0x1f, max, id, &[thread, in_die, (die, package.0, package.1)]),
        }
        if amd && cpuid.query(0x8000_0000, 0)[0] >= 0x8000_0008 {
            let e = cpuid.entry(0x8000_0008, 0, false);
            e.ecx = (e.ecx & !0xf0ff) | (per_package - 1) | self.package_shift() << 12;
            let e = cpuid.entry(0x8000_0001, 0, false);
            const CMP_LEGACY: u32 = 1 << 1;
            const TOPOEXT: u32 = 1 << 22;
            e.ecx = if per_package > 1 { e.ecx | CMP_LEGACY } else { e.ecx & !CMP_LEGACY };
            let topoext = e.ecx & TOPOEXT != 0;
            if topoext && cpuid.query(0x8000_0000, 0)[0] >= 0x8000_001e {
                let e = cpuid.entry(0x8000_001e, 0, false);
                e.eax = id;
                let core = (id & ((1 << self.package_shift()) - 1)) >> width(self.threads);
                e.ebx = (self.threads - 1) << 8 | core & 0xff;
                // A node for each die; before family 17h nodes mean processors of two dies with halves of the cores.
                e.ecx = match family >= 0x17 {
                    true => ((self.dies - 1) << 8) | (index / (self.cores * self.threads)),
                    false => index / per_package,
                };
                e.edx = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cpus: Option<u32>, sockets: Option<u32>, cores: Option<u32>, threads: Option<u32>) -> SmpSpec {
        SmpSpec { cpus, sockets, cores, threads, dies: None }
    }

    #[test]
    fn missing_members_are_made_up() {
        let t = Topology::new(&spec(Some(8), Some(2), None, Some(2))).unwrap();
        assert_eq!(t, Topology { sockets: 2, dies: 1, cores: 2, threads: 2 });
        assert_eq!(Topology::new(&spec(None, Some(2), Some(3), None)).unwrap().count(), 6);
        assert_eq!(Topology::new(&SmpSpec::default()).unwrap(), Topology::flat(1));
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(Topology::new(&spec(Some(7), Some(2), None, None)).unwrap_err().contains("not cpus (7)"));
        assert!(Topology::new(&spec(Some(0), None, None, None)).unwrap_err().contains("cpus"));
        assert!(Topology::new(&spec(Some(65), None, None, None)).unwrap_err().contains("64"));
        assert!(Topology::new(&spec(None, Some(64), Some(64), None)).is_err());
    }

    #[test]
    fn apic_ids_leave_room_for_odd_counts() {
        let t = Topology { sockets: 2, dies: 1, cores: 3, threads: 2 };
        assert_eq!(t.apic_ids().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn topology_leaves() {
        let mut c = Cpuid::default();
        c.entry(0, 0, false).eax = 0xb;
        Topology { sockets: 2, dies: 1, cores: 3, threads: 2 }.fill_cpuid(&mut c, 7);
        assert_eq!(c.query(0xb, 0), [1, 2, 0x100, 9]);
        assert_eq!(c.query(0xb, 1), [3, 6, 0x201, 9]);
        assert_eq!(c.query(1, 0)[1] >> 24, 9);
        Topology { sockets: 2, dies: 2, cores: 3, threads: 2 }.fill_cpuid(&mut c, 23);
        let id = 1 << 4 | 1 << 3 | 2 << 1 | 1;
        assert_eq!(c.query(0, 0)[0], 0x1f);
        assert_eq!(c.query(0x1f, 0), [1, 2, 0x100, id]);
        assert_eq!(c.query(0x1f, 1), [3, 6, 0x201, id]);
        assert_eq!(c.query(0x1f, 2), [4, 12, 0x502, id]);
        assert_eq!(c.query(0x1f, 3), [0, 0, 3, id]);
        assert_eq!(c.query(0xb, 1), [4, 12, 0x201, id]);
    }
}
