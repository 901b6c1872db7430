//! What travels between interrupt sources and local APICs (Intel SDM vol. 3, 11.6, 11.11).

/// Delivery mode, as the ICR, the redirection table and MSI data encode it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl Delivery {
    /// Decodes the three bits; 3 is reserved.
    pub(super) fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// Who is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// The APIC with this ID.
    Physical(u32),
    /// Those whose logical destination matches.
    Logical(u32),
    /// Everyone.
    All,
    /// Everyone but the vCPU with this index.
    AllBut(usize),
    /// The vCPU with this index.
    Index(usize),
}

impl Destination {
    /// A destination of `wide` (x2APIC, 32 bits) or narrow (8 bits) form. All ones is everyone in either.
    pub(super) fn new(dest: u32, logical: bool, wide: bool) -> Self {
        if dest == if wide { u32::MAX } else { 0xff } {
            Self::All
        } else if logical {
            Self::Logical(dest)
        } else {
            Self::Physical(dest)
        }
    }
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) destination: Destination,
    pub(super) delivery: Delivery,
    pub(super) vector: u8,
    /// Level-triggered: the end of interrupt is broadcast to the IOAPIC.
    pub(super) level: bool,
}

impl Message {
    /// Decodes an MSI (Intel SDM vol. 3, 11.11). Address bits 5 to 11 extend the destination, as KVM's
    /// "extended destination ID" has it; they are reserved, hence zero, for guests that do not know.
    pub(super) fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let address = address as u32; // checked above: below 4 GiB
        let narrow = (address >> 12) & 0xff;
        let extension = (address >> 5) & 0x7f;
        let logical = address & 0x04 != 0;
        let destination = match extension {
            0 => Destination::new(narrow, logical, false),
            _ => Destination::new(extension << 8 | narrow, logical, true),
        };
        let mut delivery = Delivery::from_bits(data >> 8)?;
        if delivery == Delivery::Startup {
            return None;
        }
        // The redirection hint asks for one of the logical destination set.
        if address & 0x08 != 0 && logical && delivery == Delivery::Fixed {
            delivery = Delivery::LowestPriority;
        }
        Some(Self { destination, delivery, vector: data as u8, level: data & 0x8000 != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields() {
        let m = Message::from_msi(0xfee0_3000, 0x41).unwrap();
        let (destination, delivery) = (Destination::Physical(3), Delivery::Fixed);
        assert_eq!(m, Message { destination, delivery, vector: 0x41, level: false });
        let m = Message::from_msi(0xfee0_5004, 0x8151).unwrap();
        let (destination, delivery) = (Destination::Logical(5), Delivery::LowestPriority);
        assert_eq!(m, Message { destination, delivery, vector: 0x51, level: true });
        assert_eq!(Message::from_msi(0xfeef_f000, 0).unwrap().destination, Destination::All);
        assert_eq!(Message::from_msi(0xfee0_1020, 0).unwrap().destination, Destination::Physical(0x101));
        assert_eq!(Message::from_msi(0xfed0_0000, 0x41), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0x41), None);
        assert_eq!(Message::from_msi(0xfee0_0000, 0x341), None);
    }
}
