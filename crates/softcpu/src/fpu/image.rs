//! FXSAVE and standard-format XSAVE images of the whole state.

use super::{Fpu, Vector, fsw, mxcsr, summarise, xcr0};

/// Offset of the XSAVE header.
pub(super) const HEADER: usize = 512;
/// Size of legacy region and header.
pub(super) const EXTENDED: usize = 576;
/// Offset of the AVX component in the standard format.
pub(super) const AVX_OFFSET: usize = 576;
/// Size of the AVX component.
pub(super) const AVX_SIZE: usize = 256;
/// Size of the standard format with everything this CPU has.
pub(super) const STANDARD_SIZE: usize = AVX_OFFSET + AVX_SIZE;

/// A state image that cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadImage {
    /// The image is too short.
    #[error("the XSAVE area has {0} bytes, fewer than the {EXTENDED} of legacy region and header")]
    Short(usize),
    /// Components that this CPU does not have.
    #[error("the XSAVE area holds state components {0:#x} that the software CPU does not have")]
    Components(u64),
    /// The compacted format.
    #[error("the XSAVE area is in the compacted format; the standard format is needed")]
    Compacted,
    /// Reserved MXCSR bits.
    #[error("MXCSR {0:#x} has reserved bits set")]
    Mxcsr(u32),
}

/// Form of the instruction and data pointers in an FXSAVE image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pointers {
    /// 64-bit offsets (FXSAVE64).
    Wide,
    /// 32-bit offsets with selectors, which are zero.
    Narrow,
}

fn put<const N: usize>(out: &mut [u8], at: usize, value: [u8; N]) {
    out[at..at + N].copy_from_slice(&value);
}

fn get<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut b = [0; N];
    b.copy_from_slice(&from[at..at + N]);
    b
}

impl Fpu {
    /// Writes the x87 part (bytes 0 to 23 and 32 to 159; MXCSR not) of an FXSAVE image.
    pub(super) fn put_x87(&mut self, out: &mut [u8], pointers: Pointers) {
        let (fop, fip, fdp) = (self.fop & 0x7ff, self.fip, self.fdp);
        let image = self.x87_ref();
        put(out, 0, image.fcw.to_le_bytes());
        put(out, 2, image.fsw.to_le_bytes());
        put(out, 4, [image.ftw, 0]);
        put(out, 6, fop.to_le_bytes());
        let narrow = |v: u64| if pointers == Pointers::Wide { v } else { v & 0xffff_ffff };
        put(out, 8, narrow(fip).to_le_bytes());
        put(out, 16, narrow(fdp).to_le_bytes());
        for (i, st) in image.st.iter().enumerate() {
            put(out, 32 + 16 * i, get::<10>(st, 0));
            put(out, 42 + 16 * i, [0; 6]);
        }
    }

    /// Loads the x87 part of an FXSAVE image.
    pub(super) fn get_x87(&mut self, from: &[u8], pointers: Pointers) {
        let narrow = |v: u64| if pointers == Pointers::Wide { v } else { v & 0xffff_ffff };
        self.fop = u16::from_le_bytes(get(from, 6)) & 0x7ff;
        self.fip = narrow(u64::from_le_bytes(get(from, 8)));
        self.fdp = narrow(u64::from_le_bytes(get(from, 16)));
        let image = self.x87();
        image.fcw = super::normalise_fcw(u16::from_le_bytes(get(from, 0)));
        image.fsw = summarise(u16::from_le_bytes(get(from, 2)), image.fcw);
        image.ftw = from[4];
        for (i, st) in image.st.iter_mut().enumerate() {
            *st = [0; 16];
            st[..10].copy_from_slice(&from[32 + 16 * i..42 + 16 * i]);
        }
    }

    /// x87 to its initial configuration.
    pub(super) fn init_x87(&mut self) {
        self.x87().st = [[0; 16]; 8];
        self.fninit();
    }

    /// Writes MXCSR and its mask.
    pub(super) fn put_mxcsr(&self, out: &mut [u8]) {
        put(out, 24, self.mxcsr().to_le_bytes());
        put(out, 28, mxcsr::VALID.to_le_bytes());
    }

    /// MXCSR of an image.
    pub(super) fn image_mxcsr(from: &[u8]) -> u32 {
        u32::from_le_bytes(get(from, 24))
    }

    /// Writes XMM registers 0 to `count`.
    pub(super) fn put_xmm(&self, out: &mut [u8], count: usize) {
        for (i, v) in self.vec.iter().take(count).enumerate() {
            put(out, 160 + 16 * i, v.xmm());
        }
    }

    /// Loads XMM registers 0 to `count`; the upper halves stay.
    pub(super) fn get_xmm(&mut self, from: &[u8], count: usize) {
        for (i, v) in self.vec.iter_mut().take(count).enumerate() {
            put(&mut v.0, 0, get::<16>(from, 160 + 16 * i));
        }
    }

    /// Writes the AVX component, `out` being its 256 bytes.
    pub(super) fn put_avx(&self, out: &mut [u8], count: usize) {
        for (i, v) in self.vec.iter().take(count).enumerate() {
            put(out, 16 * i, get::<16>(&v.0, 16));
        }
    }

    /// Loads the AVX component.
    pub(super) fn get_avx(&mut self, from: &[u8], count: usize) {
        for (i, v) in self.vec.iter_mut().take(count).enumerate() {
            put(&mut v.0, 16, get::<16>(from, 16 * i));
        }
    }

    /// Components that are not in their initial configuration (XINUSE; Intel SDM vol. 1, 13.6). MXCSR is no part of it.
    pub(super) fn in_use(&mut self) -> u64 {
        let (fop, fip, fdp) = (self.fop, self.fip, self.fdp);
        let x87 = self.x87_ref();
        let fresh =
            x87.fcw == super::FCW_INIT && x87.fsw == 0 && x87.ftw == 0 && (fop, fip, fdp) == (0, 0, 0);
        let fresh = fresh && x87.st.iter().all(|r| r[..10] == [0; 10]);
        let sse = self.vec.iter().any(|v| v.0[..16] != [0; 16]);
        let avx = self.vec.iter().any(|v| v.0[16..32] != [0; 16]);
        u64::from(!fresh) | u64::from(sse) << 1 | u64::from(avx) << 2
    }

    /// The state as a standard-format XSAVE area with every component present.
    pub fn to_xsave(&mut self) -> Vec<u8> {
        let mut out = vec![0; STANDARD_SIZE];
        self.put_x87(&mut out, Pointers::Wide);
        self.put_mxcsr(&mut out);
        self.put_xmm(&mut out, 16);
        self.put_avx(&mut out[AVX_OFFSET..], 16);
        put(&mut out, HEADER, xcr0::SUPPORTED.to_le_bytes());
        out
    }

    /// Loads a standard-format XSAVE area; components that it does not hold get their initial configuration.
    ///
    /// # Errors
    /// An image that is malformed, or holds state this CPU does not have; nothing is loaded then.
    pub fn from_xsave(&mut self, image: &[u8]) -> Result<(), BadImage> {
        if image.len() < EXTENDED {
            return Err(BadImage::Short(image.len()));
        }
        let bv = u64::from_le_bytes(get(image, HEADER));
        if u64::from_le_bytes(get(image, HEADER + 8)) != 0 {
            return Err(BadImage::Compacted);
        }
        if bv & !xcr0::SUPPORTED != 0 {
            return Err(BadImage::Components(bv & !xcr0::SUPPORTED));
        }
        if bv & xcr0::AVX != 0 && image.len() < STANDARD_SIZE {
            return Err(BadImage::Short(image.len()));
        }
        let new_mxcsr = Self::image_mxcsr(image);
        if new_mxcsr & !mxcsr::VALID != 0 {
            return Err(BadImage::Mxcsr(new_mxcsr));
        }
        if bv & xcr0::X87 != 0 {
            self.get_x87(image, Pointers::Wide);
        } else {
            self.init_x87();
        }
        self.set_mxcsr(new_mxcsr);
        self.vec = [Vector([0; 64]); 16];
        if bv & xcr0::SSE != 0 {
            self.get_xmm(image, 16);
        }
        if bv & xcr0::AVX != 0 {
            self.get_avx(&image[AVX_OFFSET..], 16);
        }
        Ok(())
    }

    /// Whether a raised x87 exception is unmasked, in memory or in the host's unit.
    pub fn x87_summary(&self) -> bool {
        self.fsw() & fsw::ES != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_it_does_not_have() {
        let mut f = Fpu::new();
        assert_eq!(f.from_xsave(&[0; 100]), Err(BadImage::Short(100)));
        let mut image = f.to_xsave();
        image[HEADER] = 0x80 | 1;
        assert_eq!(f.from_xsave(&image), Err(BadImage::Components(0x80)));
        image[HEADER] = 7;
        image[HEADER + 15] = 0x80;
        assert_eq!(f.from_xsave(&image), Err(BadImage::Compacted));
        image[HEADER + 15] = 0;
        image[26] = 1;
        assert_eq!(f.from_xsave(&image), Err(BadImage::Mxcsr(0x11f80)));
    }

    #[test]
    fn components_absent_from_the_image_are_initialised() {
        let mut f = Fpu::new();
        f.fninit();
        f.vec[3].0[0] = 1;
        f.vec[4].0[16] = 1;
        assert_eq!(f.in_use(), 6);
        let mut image = f.to_xsave();
        image[HEADER] = 2;
        f.from_xsave(&image).unwrap();
        assert_eq!((f.vec[3].0[0], f.vec[4].0[16]), (1, 0));
        assert_eq!(f.in_use(), 2);
    }

    proptest! {
        #[test]
        fn images_round_trip(bytes in proptest::collection::vec(any::<u8>(), STANDARD_SIZE)) {
            let mut image = bytes;
            image[HEADER..EXTENDED].fill(0);
            image[HEADER] = 7;
            image[26..28].fill(0); // MXCSR
            let mut f = Fpu::new();
            f.from_xsave(&image).unwrap();
            let once = f.to_xsave();
            let mut g = Fpu::new();
            g.from_xsave(&once).unwrap();
            prop_assert_eq!(&once, &g.to_xsave());
            prop_assert_eq!(&once[32..42], &image[32..42]);
            prop_assert_eq!(&once[160..416], &image[160..416]);
            prop_assert_eq!(&once[AVX_OFFSET..], &image[AVX_OFFSET..]);
        }
    }
}
