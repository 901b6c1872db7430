//! The smallest guest: an ELF kernel with a PVH entry that writes one line to the serial port and resets.
//!
//! What it takes to run it is what the monitor costs by itself. The PVH note is that of the Xen hypervisor's
//! `docs/misc/pvh.pandoc` (`XEN_ELFNOTE_PHYS32_ENTRY`): the entry is 32-bit code without paging.

const LOAD_ADDRESS: u32 = 0x10_0000;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE: usize = 24;
const NOTE_AT: usize = HEADER + 2 * PROGRAM_HEADER;
const CODE_AT: usize = NOTE_AT + NOTE;

/// Builds the ELF file. The guest prints `line`, which must hold no NUL, and a newline.
pub fn kernel(line: &str) -> Vec<u8> {
    let code = code(line);
    let size = (CODE_AT + code.len()) as u64;
    let entry = u64::from(LOAD_ADDRESS) + CODE_AT as u64;

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let (executable, x86_64, version) = (2u16, 62u16, 1u32);
    file.extend_from_slice(&executable.to_le_bytes());
    file.extend_from_slice(&x86_64.to_le_bytes());
    file.extend_from_slice(&version.to_le_bytes());
    file.extend_from_slice(&entry.to_le_bytes());
    file.extend_from_slice(&(HEADER as u64).to_le_bytes()); // program headers
    file.extend_from_slice(&0u64.to_le_bytes()); // no section headers
    file.extend_from_slice(&0u32.to_le_bytes()); // flags
    for half in [HEADER, PROGRAM_HEADER, 2, 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let (load, note, readable, all) = (1, 4, 4, 7);
    file.extend(program_header(load, all, 0, size, 0x1000));
    file.extend(program_header(note, readable, NOTE_AT as u64, NOTE as u64, 4));
    for word in [4u32, 8, 18] {
        file.extend_from_slice(&word.to_le_bytes()); // size of the name, size of the value, type
    }
    file.extend_from_slice(b"Xen\0");
    file.extend_from_slice(&entry.to_le_bytes());
    file.extend(code);
    file
}

fn program_header(kind: u32, flags: u32, offset: u64, size: u64, align: u64) -> Vec<u8> {
    let address = u64::from(LOAD_ADDRESS) + offset;
    let mut header = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    for long in [offset, address, address, size, size, align] {
        header.extend_from_slice(&long.to_le_bytes());
    }
    header
}

fn code(line: &str) -> Vec<u8> {
    const LENGTH: u32 = 32;
    let text = LOAD_ADDRESS + CODE_AT as u32 + LENGTH;
    let mut code = vec![0xbe]; // mov esi, text
    code.extend_from_slice(&text.to_le_bytes());
    code.extend_from_slice(&[0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8: the transmitter of the first serial port
    code.extend_from_slice(&[0xac]); // next: lodsb
    code.extend_from_slice(&[0x84, 0xc0]); // test al, al
    code.extend_from_slice(&[0x74, 0x03]); // jz done
    code.extend_from_slice(&[0xee]); // out dx, al
    code.extend_from_slice(&[0xeb, 0xf8]); // jmp next
    code.extend_from_slice(&[0xb0, 0xfe, 0xe6, 0x64]); // done: the keyboard controller resets the machine
    code.extend_from_slice(&[0x0f, 0x0b]); // without one, ud2 and no interrupt table: a triple fault
    code.resize(LENGTH as usize, 0xf4); // hlt
    code.extend_from_slice(line.as_bytes());
    code.extend_from_slice(b"\r\n\0");
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_agree() {
        let file = kernel("hello");
        assert!(crate::elf::is_elf64(&file));
        let entry = u64::from_le_bytes(file[24..32].try_into().expect("entry"));
        assert_eq!(entry - u64::from(LOAD_ADDRESS), CODE_AT as u64);
        assert_eq!(&file[NOTE_AT + 12..NOTE_AT + 16], b"Xen\0");
        assert_eq!(file[NOTE_AT + 16..NOTE_AT + 24], entry.to_le_bytes());
        let text = u32::from_le_bytes(file[CODE_AT + 1..CODE_AT + 5].try_into().expect("address"));
        assert!(file[(text - LOAD_ADDRESS) as usize..].starts_with(b"hello\r\n\0"));
        // The conditional jump passes over `out` and `jmp`, and the loop jump lands on `lodsb`.
        assert_eq!(file[CODE_AT + 9], 0xac);
        assert_eq!(file[CODE_AT + 12..CODE_AT + 14], [0x74, 3]);
        assert_eq!(i32::from(file[CODE_AT + 16] as i8) + 17, 9);
    }
}
