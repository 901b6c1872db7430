//! PS/2 keyboard and mouse (IBM PS/2 Hardware Interface Technical Reference, keyboard and auxiliary device; Microsoft
//! "Key Support, Keyboard Scan Codes" and IntelliMouse protocol).

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Bytes a device holds for its host. Keys and movements that do not fit are lost, answers are not.
const QUEUE: usize = 16;
/// Room that input leaves for answers.
const RESERVED: usize = 8;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// What the controller makes of a keyboard's set 2 codes, so that software sees set 1: index is the set 2 code.
#[rustfmt::skip]
const SET2_TO_SET1: [u8; 0x85] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
    0x80, 0x81, 0x82, 0x41, 0x54,
];

/// Prefix of a released key in set 2.
pub(super) const BREAK: u8 = 0xf0;

/// Translates a byte from the keyboard as the controller does, [`BREAK`] apart.
pub(super) fn translate(byte: u8) -> u8 {
    SET2_TO_SET1.get(usize::from(byte)).copied().unwrap_or(byte)
}

/// Set 2 code of a key whose set 1 code this is.
fn set2_of(set1: u8) -> Option<u8> {
    // From the end: the codes 0x83 and 0x84 are the ones in use where there are two.
    SET2_TO_SET1.iter().rposition(|c| *c == set1).map(|i| i as u8) // below 0x85
}

fn put(queue: &mut VecDeque<u8>, bytes: &[u8]) {
    for b in bytes {
        if queue.len() < QUEUE {
            queue.push_back(*b);
        }
    }
}

/// A keyboard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Keyboard {
    queue: VecDeque<u8>,
    /// Scan code set, 1 or 2.
    set: u8,
    enabled: bool,
    /// Command that awaits its argument.
    pending: Option<u8>,
    leds: u8,
    typematic: u8,
    last: u8,
}

impl Keyboard {
    pub(super) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            set: 2,
            enabled: true,
            pending: None,
            leds: 0,
            typematic: 0x2b,
            last: 0,
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        self.queue.len() <= QUEUE && matches!(self.set, 1 | 2)
    }

    /// LEDs: scroll lock bit 0, num lock bit 1, caps lock bit 2.
    pub(super) fn leds(&self) -> u8 {
        self.leds
    }

    pub(super) fn has_data(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    /// A key goes down or up. `code` is its set 1 code, with 0x80 set for those with the prefix 0xe0; 0xc5 is Pause.
    pub(super) fn key(&mut self, code: u8, down: bool) {
        /// Set 1's Pause: prefix and code of keypad Num Lock, which needs a key of its own.
        const PAUSE: u8 = 0xc5;
        if !self.enabled {
            return;
        }
        let mut bytes = Vec::with_capacity(8);
        if code == PAUSE {
            if down {
                match self.set {
                    1 => bytes.extend([0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]),
                    _ => bytes.extend([0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]),
                }
            }
        } else {
            if code & 0x80 != 0 {
                bytes.push(0xe0);
            }
            let base = code & 0x7f;
            if self.set == 1 {
                bytes.push(base | if down { 0 } else { 0x80 });
            } else {
                let Some(code) = set2_of(base) else { return };
                if !down {
                    bytes.push(BREAK);
                }
                bytes.push(code);
            }
        }
        // All of a key's bytes or none.
        if self.queue.len() + bytes.len() <= QUEUE - RESERVED {
            self.queue.extend(bytes);
        }
    }

    fn defaults(&mut self) {
        *self =
            Self { queue: std::mem::take(&mut self.queue), leds: self.leds, last: self.last, ..Self::new() };
    }

    /// A byte from the host.
    pub(super) fn command(&mut self, byte: u8) {
        let answer: &[u8] = match (self.pending.take(), byte) {
            (Some(0xed), leds @ 0..0x80) => {
                self.leds = leds & 7;
                &[ACK]
            }
            (Some(0xf3), rate @ 0..0x80) => {
                self.typematic = rate;
                &[ACK]
            }
            (Some(0xf0), 0) => match self.set {
                1 => &[ACK, 1],
                _ => &[ACK, 2],
            },
            (Some(0xf0), set @ (1 | 2)) => {
                self.set = set;
                &[ACK]
            }
            // Scan code set 3, which this keyboard does not have.
            (Some(0xf0), 3..0x80) => &[RESEND],
            // Key types of single keys are set 3's business; the keys are taken and forgotten.
            (Some(0xfb..=0xfd), 0..0x80) => &[ACK],
            (_, 0xed | 0xf0 | 0xf3 | 0xfb..=0xfd) => {
                self.pending = Some(byte);
                &[ACK]
            }
            (_, 0xee) => &[0xee],
            (_, 0xf2) => &[ACK, 0xab, 0x83],
            (_, 0xf4) => {
                self.queue.clear();
                self.enabled = true;
                &[ACK]
            }
            (_, 0xf5) => {
                self.defaults();
                self.enabled = false;
                &[ACK]
            }
            (_, 0xf6) => {
                self.defaults();
                &[ACK]
            }
            (_, 0xf7..=0xfa) => &[ACK],
            (_, 0xfe) => {
                let last = self.last;
                put(&mut self.queue, &[last]);
                &[]
            }
            (_, 0xff) => {
                *self = Self::new();
                &[ACK, SELF_TEST_PASSED]
            }
            _ => &[RESEND],
        };
        put(&mut self.queue, answer);
    }
}

/// A mouse: three buttons, and a wheel once the host has asked for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mouse {
    queue: VecDeque<u8>,
    pending: Option<u8>,
    /// Whether it reports by itself.
    reporting: bool,
    remote: bool,
    wrap: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// 0 (plain), 3 (wheel) or 4 (wheel and five buttons).
    id: u8,
    /// The last three rates set; certain sequences change the ID.
    rates: [u8; 3],
    buttons: u8,
    /// Movement not reported yet.
    moved: [i32; 3],
    last: u8,
}

impl Mouse {
    pub(super) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            pending: None,
            reporting: false,
            remote: false,
            wrap: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            id: 0,
            rates: [0; 3],
            buttons: 0,
            moved: [0; 3],
            last: 0,
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        const FAR: u32 = 1 << 20;
        self.queue.len() <= QUEUE
            && matches!(self.id, 0 | 3 | 4)
            && self.moved.iter().all(|m| m.unsigned_abs() <= FAR)
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last = byte;
        if self.queue.is_empty() && self.reporting && !self.remote && self.moved != [0; 3] {
            self.report();
        }
        Some(byte)
    }

    /// Movement to the right, up and away from the user (wheel), and the buttons now held (left bit 0, right bit 1,
    /// middle bit 2, side bits 3 and 4).
    pub(super) fn input(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        const FAR: i32 = 1 << 20;
        for (sum, d) in self.moved.iter_mut().zip([dx, dy, dz]) {
            *sum = sum.saturating_add(d).clamp(-FAR, FAR);
        }
        let changed = self.buttons != buttons & 0x1f || self.moved != [0; 3];
        self.buttons = buttons & 0x1f;
        if self.reporting && !self.remote && !self.wrap && changed && self.queue.len() + 4 <= QUEUE - RESERVED
        {
            self.report();
        }
    }

    fn report(&mut self) {
        let mut part = |i: usize, most: i32| {
            let d = self.moved[i].clamp(-most, most);
            self.moved[i] -= d;
            d
        };
        let (dx, dy) = (part(0, 255), part(1, 255));
        // The wheel counts towards the user.
        let dz = if self.id == 0 { 0 } else { -part(2, 7) };
        if self.id == 0 {
            self.moved[2] = 0;
        }
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        put(&mut self.queue, &[self.buttons & 7 | 8 | signs, dx as u8, dy as u8]); // nine bits, with the signs
        match self.id {
            3 => put(&mut self.queue, &[dz as u8]),
            4 => put(&mut self.queue, &[dz as u8 & 0xf | (self.buttons & 0x18) << 1]),
            _ => {}
        }
    }

    fn status(&self) -> [u8; 3] {
        // Left and right are bits 2 and 0 here, the middle button is bit 1.
        let buttons = (self.buttons & 1) << 2 | (self.buttons & 4) >> 1 | (self.buttons & 2) >> 1;
        let modes = u8::from(self.scaling) << 4 | u8::from(self.reporting) << 5 | u8::from(self.remote) << 6;
        [buttons | modes, self.resolution, self.rate]
    }

    fn set_rate(&mut self, rate: u8) {
        self.rate = rate;
        self.rates = [self.rates[1], self.rates[2], rate];
        match self.rates {
            [200, 100, 80] => self.id = 3,
            [200, 200, 80] if self.id == 3 => self.id = 4,
            _ => {}
        }
    }

    fn defaults(&mut self) {
        *self = Self { queue: std::mem::take(&mut self.queue), id: self.id, last: self.last, ..Self::new() };
    }

    /// A byte from the host.
    pub(super) fn command(&mut self, byte: u8) {
        if self.wrap && !matches!(byte, 0xec | 0xff) {
            put(&mut self.queue, &[byte]);
            return;
        }
        match self.pending.take() {
            Some(0xf3) => {
                self.set_rate(byte);
                return put(&mut self.queue, &[ACK]);
            }
            Some(0xe8) => {
                self.resolution = byte & 3;
                return put(&mut self.queue, &[ACK]);
            }
            _ => {}
        }
        let mut answer = vec![ACK];
        match byte {
            0xe6 => self.scaling = false,
            0xe7 => self.scaling = true,
            0xe8 | 0xf3 => self.pending = Some(byte),
            0xe9 => answer.extend(self.status()),
            0xea => self.remote = false,
            0xeb => {
                put(&mut self.queue, &answer);
                return self.report();
            }
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf0 => self.remote = true,
            0xf2 => answer.push(self.id),
            0xf4 => {
                self.reporting = true;
                self.moved = [0; 3];
            }
            0xf5 => self.reporting = false,
            0xf6 => self.defaults(),
            0xfe => answer = vec![self.last],
            0xff => {
                *self = Self::new();
                answer.extend([SELF_TEST_PASSED, 0]);
            }
            _ => answer = vec![RESEND],
        }
        put(&mut self.queue, &answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(k: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| k.take()).collect()
    }

    fn bytes(m: &mut Mouse) -> Vec<u8> {
        std::iter::from_fn(|| m.take()).collect()
    }

    #[test]
    fn keyboard_commands() {
        let mut k = Keyboard::new();
        for (commands, answers) in [
            (&[0xff][..], &[0xfa, 0xaa][..]),
            (&[0xf2], &[0xfa, 0xab, 0x83]),
            (&[0xed, 0x07], &[0xfa, 0xfa]),
            (&[0xee], &[0xee]),
            (&[0xf0, 0], &[0xfa, 0xfa, 2]),
            (&[0xf0, 1, 0xf0, 0], &[0xfa, 0xfa, 0xfa, 0xfa, 1]),
            (&[0xf0, 3], &[0xfa, 0xfe]),
            (&[0xf3, 0x20], &[0xfa, 0xfa]),
            (&[0x01], &[0xfe]),
            (&[0xed, 0xf2], &[0xfa, 0xfa, 0xab, 0x83]),
            (&[0xfe], &[0x83]),
        ] {
            commands.iter().for_each(|c| k.command(*c));
            assert_eq!(keys(&mut k), answers, "{commands:x?}");
        }
        assert_eq!(k.leds(), 7);
    }

    #[test]
    fn keys_in_both_sets() {
        let mut k = Keyboard::new();
        k.key(0x1e, true);
        k.key(0x1e, false);
        assert_eq!(keys(&mut k), [0x1c, 0xf0, 0x1c]);
        k.key(0xc8, true);
        k.key(0xc8, false);
        assert_eq!(keys(&mut k), [0xe0, 0x75, 0xe0, 0xf0, 0x75]);
        k.key(0xc5, true);
        assert_eq!(keys(&mut k), [0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77]);
        k.command(0xf0);
        k.command(1);
        keys(&mut k);
        k.key(0xc8, true);
        k.key(0x1e, false);
        assert_eq!(keys(&mut k), [0xe0, 0x48, 0x9e]);
        (0..100).for_each(|_| k.key(0x1e, true));
        assert!(keys(&mut k).len() <= QUEUE - RESERVED);
        k.command(0xf5);
        k.key(0x1e, true);
        assert_eq!(keys(&mut k), [0xfa]);
    }

    #[test]
    fn translation_is_the_inverse_for_every_key() {
        for set1 in 1..0x54u8 {
            let set2 = set2_of(set1).unwrap();
            assert_eq!(translate(set2), set1);
        }
        assert_eq!((set2_of(0x41), set2_of(0x57), set2_of(0x58)), (Some(0x83), Some(0x78), Some(0x07)));
        assert_eq!((translate(0xfa), translate(0xab), translate(0x83)), (0xfa, 0xab, 0x41));
        let mut seen = [0u8; 256];
        SET2_TO_SET1[..0x80].iter().for_each(|c| seen[usize::from(*c)] += 1);
        assert!(seen.iter().all(|n| *n <= 1), "no set 1 code has two set 2 codes below 0x80");
    }

    #[test]
    fn mouse_commands() {
        let mut m = Mouse::new();
        for (commands, answers) in [
            (&[0xff][..], &[0xfa, 0xaa, 0][..]),
            (&[0xf2], &[0xfa, 0]),
            (&[0xe8, 3], &[0xfa, 0xfa]),
            (&[0xe9], &[0xfa, 0, 3, 100]),
            (&[0xf3, 200, 0xf3, 100, 0xf3, 80], &[0xfa; 6]),
            (&[0xf2], &[0xfa, 3]),
            (&[0xee, 0x12, 0xec], &[0xfa, 0x12, 0xfa]),
            (&[0x12], &[0xfe]),
        ] {
            commands.iter().for_each(|c| m.command(*c));
            assert_eq!(bytes(&mut m), answers, "{commands:x?}");
        }
    }

    #[test]
    fn mouse_movement() {
        let mut m = Mouse::new();
        m.input(1, 1, 0, 1);
        assert_eq!(bytes(&mut m), [0; 0], "not asked to report");
        m.command(0xf4);
        bytes(&mut m);
        m.input(5, -3, 0, 2);
        assert_eq!(bytes(&mut m), [0x2a, 5, 0xfd]);
        m.input(300, 0, 0, 0);
        assert_eq!(bytes(&mut m), [8, 255, 0, 8, 45, 0], "a long way goes in two reports");
        m.input(0, 0, 0, 0);
        assert_eq!(bytes(&mut m), [0; 0]);
        for rate in [200, 100, 80] {
            m.command(0xf3);
            m.command(rate);
        }
        bytes(&mut m);
        m.input(0, 0, 1, 0);
        assert_eq!(bytes(&mut m), [8, 0, 0, 0xff]);
    }
}
