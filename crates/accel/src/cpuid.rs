//! CPUID tables.

use serde::{Deserialize, Serialize};

/// One CPUID leaf (and subleaf).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Leaf (EAX on input).
    pub leaf: u32,
    /// Subleaf (ECX on input), where `indexed`.
    pub subleaf: u32,
    /// Whether the subleaf is significant.
    pub indexed: bool,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// What a vCPU answers to CPUID.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid {
    /// The leaves, in any order, each (leaf, subleaf) once.
    pub entries: Vec<CpuidEntry>,
}

impl Cpuid {
    /// The entry of a leaf and subleaf, exactly (the subleaf is ignored for leaves that have none).
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// The entry of a leaf and subleaf, created (zeroed) if missing. `indexed` applies on creation.
    pub fn entry(&mut self, leaf: u32, subleaf: u32, indexed: bool) -> &mut CpuidEntry {
        let at = self.entries.iter().position(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf));
        let at = at.unwrap_or_else(|| {
            self.entries.push(CpuidEntry { leaf, subleaf, indexed, ..Default::default() });
            self.entries.len() - 1
        });
        &mut self.entries[at]
    }

    /// Removes a leaf with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.entries.retain(|e| e.leaf != leaf);
    }

    /// What the instruction returns (EAX, EBX, ECX, EDX): leaves past the highest basic leaf answer as zeros
    /// (AMD's behaviour, APM vol. 3, CPUID).
    pub fn query(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.get(leaf, subleaf).map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_and_creation() {
        let mut c = Cpuid::default();
        c.entry(1, 0, false).ecx = 5;
        c.entry(7, 1, true).eax = 9;
        assert_eq!(c.query(1, 77), [0, 0, 5, 0]);
        assert_eq!(c.query(7, 1)[0], 9);
        assert_eq!(c.query(7, 0), [0; 4]);
        c.entry(1, 0, false).ecx |= 2;
        assert_eq!(c.entries.len(), 2);
        c.remove(7);
        assert_eq!(c.entries.len(), 1);
    }
}
