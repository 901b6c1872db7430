//! Screens of characters.

/// A character cell of a text screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The character (code page 437 where the guest uses the PC's font).
    pub ch: char,
    /// Foreground, 0x00RRGGBB.
    pub fg: u32,
    /// Background, 0x00RRGGBB.
    pub bg: u32,
}

impl Default for Cell {
    fn default() -> Self {
        Self { ch: ' ', fg: 0xaa_aaaa, bg: 0 }
    }
}

/// What a device in a text mode shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextScreen {
    /// Columns.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
    /// Cells, row by row.
    pub cells: Vec<Cell>,
    /// Column and row of the cursor, if it is shown.
    pub cursor: Option<(u32, u32)>,
}

impl TextScreen {
    /// The characters, a line each, without trailing blanks.
    pub fn lines(&self) -> Vec<String> {
        self.cells
            .chunks(self.columns.max(1) as usize)
            .map(|row| row.iter().map(|c| c.ch).collect::<String>().trim_end().to_owned())
            .collect()
    }
}

/// Characters of the PC's font above ASCII and below the space (IBM code page 437).
const CP437_HIGH: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";
const CP437_LOW: &str = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";

/// The character of a code of the PC's font.
pub fn from_cp437(code: u8) -> char {
    match code {
        0..0x20 => CP437_LOW.chars().nth(code.into()).unwrap_or(' '),
        0x7f => '⌂',
        0x80.. => CP437_HIGH.chars().nth(usize::from(code - 0x80)).unwrap_or(' '),
        _ => code.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_page() {
        assert_eq!(CP437_HIGH.chars().count(), 128);
        assert_eq!(CP437_LOW.chars().count(), 32);
        assert_eq!(
            (from_cp437(b'A'), from_cp437(0xdb), from_cp437(0xc4), from_cp437(0x10)),
            ('A', '█', '─', '►')
        );
    }

    #[test]
    fn lines_lose_trailing_blanks() {
        let mut s = TextScreen { columns: 3, rows: 2, cells: vec![Cell::default(); 6], cursor: None };
        s.cells[3].ch = 'x';
        assert_eq!(s.lines(), ["", "x"]);
    }
}
