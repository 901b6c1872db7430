//! Random numbers, and values that instructions find interesting.

/// SplitMix64.
#[derive(Clone)]
pub struct Rng(u64);

const INTEGERS: [u64; 22] = [
    0,
    1,
    2,
    3,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ff80,
    0xffff_ffff_8000_0000,
    0x5555_5555_5555_5555,
];

const SINGLES: [u32; 20] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    1,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_0001,
    0x7f80_0001,
    0x3f00_0000,
    0x3fc0_0000,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0x4b80_0001,
    0x3fff_ffff,
];

const DOUBLES: [u64; 20] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001,
    0x7ff0_0000_0000_0001,
    0x3fe0_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0020_0000,
    0x43e0_0000_0000_0000,
    0x3810_0000_0000_0000,
    0x47ef_ffff_f000_0000,
];

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n.max(1))) >> 64) as u64
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0..=2 => self.next(),
            3 | 4 => self.pick(&INTEGERS),
            5 => self.next() >> self.below(64),
            6 => 1u64.rotate_left(self.below(64) as u32).wrapping_sub(self.below(2)),
            _ => self.below(64),
        }
    }

    fn single(&mut self) -> u32 {
        match self.below(4) {
            0 => self.pick(&SINGLES),
            // Near one, so that sums and products stay in range.
            1 => (self.next() as u32 & 0x807f_ffff) | (0x3f00_0000 + (self.below(16) as u32) * 0x0080_0000),
            2 => (self.next() as u32 & 0x8000_0000) | (self.below(200) as f32).to_bits(),
            _ => self.next() as u32,
        }
    }

    fn double(&mut self) -> u64 {
        match self.below(4) {
            0 => self.pick(&DOUBLES),
            1 => (self.next() & 0x800f_ffff_ffff_ffff) | ((0x3f8 + self.below(16)) << 52),
            2 => (self.next() & 0x8000_0000_0000_0000) | (self.below(70000) as f64).to_bits(),
            _ => self.next(),
        }
    }

    /// Eight bytes of a vector register or of memory.
    pub fn lane(&mut self) -> u64 {
        match self.below(5) {
            0 => self.integer(),
            1 => self.double(),
            2 | 3 => u64::from(self.single()) | u64::from(self.single()) << 32,
            _ => self.next(),
        }
    }

    /// A vector register.
    pub fn vector(&mut self) -> [u8; 32] {
        let mut v = [0; 32];
        match self.below(8) {
            0 => {}
            1 => v.fill(0xff),
            _ => {
                for chunk in v.chunks_exact_mut(8) {
                    chunk.copy_from_slice(&self.lane().to_le_bytes());
                }
            }
        }
        v
    }

    /// An extended-precision number, of any of its classes.
    pub fn extended(&mut self) -> [u8; 10] {
        let (mantissa, exponent) = match self.below(12) {
            0 => (0, 0),
            1 => (1 << 63, 0x3fff),
            2 => (1 << 63, 0x7fff),                          // infinity
            3 => (3 << 62 | self.next() >> 2, 0x7fff),       // quiet NaN
            4 => ((1 << 63) | self.next() >> 2 | 1, 0x7fff), // signalling NaN
            5 => (self.next() >> (1 + self.below(62)), 0),   // denormal
            6 => (self.next() >> 1, self.below(0x8000)),     // unnormal
            7 => (self.integer() | 1 << 63, 0x3fff + self.below(64)),
            8 => (self.next() | 1 << 63, self.below(0x7fff)),
            _ => (self.next() | 1 << 63, 0x3ff0 + self.below(32)),
        };
        let mut b = [0; 10];
        b[..8].copy_from_slice(&mantissa.to_le_bytes());
        b[8..].copy_from_slice(&(exponent as u16 | (self.below(2) as u16) << 15).to_le_bytes());
        b
    }
}
