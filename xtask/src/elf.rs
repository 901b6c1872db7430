//! As much of ELF64 as these tasks need: finding a section of a kernel module or a kernel.

use anyhow::{Context, Result, ensure};

fn word<const N: usize>(data: &[u8], at: usize) -> Result<[u8; N]> {
    let bytes = at.checked_add(N).and_then(|end| data.get(at..end)).context("truncated ELF file")?;
    bytes.try_into().context("truncated ELF file")
}

fn half(data: &[u8], at: usize) -> Result<usize> {
    Ok(usize::from(u16::from_le_bytes(word(data, at)?)))
}

fn int(data: &[u8], at: usize) -> Result<usize> {
    Ok(u32::from_le_bytes(word(data, at)?) as usize)
}

fn long(data: &[u8], at: usize) -> Result<usize> {
    usize::try_from(u64::from_le_bytes(word(data, at)?)).context("ELF offset out of range")
}

/// Whether these bytes start a 64-bit little-endian ELF file.
pub fn is_elf64(data: &[u8]) -> bool {
    data.starts_with(b"\x7fELF\x02\x01")
}

/// The contents of the section of this name; `None` when there is none.
pub fn section<'a>(data: &'a [u8], name: &str) -> Result<Option<&'a [u8]>> {
    ensure!(is_elf64(data), "not a 64-bit little-endian ELF file");
    let (table, size, count) = (long(data, 0x28)?, half(data, 0x3a)?, half(data, 0x3c)?);
    let names = half(data, 0x3e)?;
    let header = |index: usize| {
        let offset = size.checked_mul(index).and_then(|offset| offset.checked_add(table));
        offset.context("ELF section table out of range")
    };
    let contents = |at: usize| -> Result<&'a [u8]> {
        let (offset, length) = (long(data, at + 0x18)?, long(data, at + 0x20)?);
        let end = offset.checked_add(length).context("ELF section out of range")?;
        data.get(offset..end).context("ELF section out of range")
    };
    let strings = contents(header(names)?)?;
    for index in 0..count {
        let at = header(index)?;
        let found = strings.get(int(data, at)?..).and_then(|rest| rest.split(|byte| *byte == 0).next());
        if found == Some(name.as_bytes()) {
            return contents(at).map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_sections_of_this_program() {
        let own = std::fs::read(std::env::current_exe().expect("path")).expect("own program");
        assert!(is_elf64(&own));
        assert!(section(&own, ".text").expect("parses").is_some_and(|text| text.len() > 1000));
        assert_eq!(section(&own, ".no-such-section").expect("parses"), None);
    }

    #[test]
    fn truncated_files_are_errors() {
        let own = std::fs::read(std::env::current_exe().expect("path")).expect("own program");
        assert!(section(&own[..4000], ".text").is_err());
        assert!(section(b"\x7fELF\x02\x01", ".text").is_err());
        assert!(section(b"MZ", ".text").is_err());
    }
}
