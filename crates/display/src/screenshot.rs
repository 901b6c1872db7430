//! Pictures as files.

use crate::Frame;
use std::io;
use std::path::Path;

/// Format of a picture file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PictureFormat {
    /// Portable Network Graphics.
    #[default]
    Png,
    /// Portable pixmap (P6).
    Ppm,
}

fn rgb(frame: &Frame) -> Vec<u8> {
    frame.pixels().iter().flat_map(|p| [(p >> 16) as u8, (p >> 8) as u8, *p as u8]).collect()
}

/// The file's contents.
///
/// # Errors
/// The encoder's, which for pictures in memory means that the size is impossible.
pub fn encode_picture(frame: &Frame, format: PictureFormat) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    match format {
        PictureFormat::Ppm => {
            out.extend(format!("P6\n{} {}\n255\n", frame.width(), frame.height()).into_bytes());
            out.extend(rgb(frame));
        }
        PictureFormat::Png => {
            let mut encoder = png::Encoder::new(&mut out, frame.width(), frame.height());
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            let mut writer = encoder.write_header().map_err(io::Error::other)?;
            writer.write_image_data(&rgb(frame)).map_err(io::Error::other)?;
            writer.finish().map_err(io::Error::other)?;
        }
    }
    Ok(out)
}

/// Writes a picture to a file, which is replaced whole or not at all.
///
/// # Errors
/// The host's refusal.
pub fn write_picture(frame: &Frame, format: PictureFormat, path: &Path) -> io::Result<()> {
    let data = encode_picture(frame, format)?;
    if path.metadata().is_ok_and(|m| !m.is_file()) {
        return std::fs::write(path, data); // a pipe or device
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let beside = path.with_file_name(name);
    std::fs::write(&beside, data)?;
    std::fs::rename(&beside, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&beside); // the rename's error is the one to tell
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files() {
        let mut frame = Frame::new(3, 2).unwrap();
        frame.row_mut(1)[2] = 0x12_3456;
        let ppm = encode_picture(&frame, PictureFormat::Ppm).unwrap();
        assert!(ppm.starts_with(b"P6\n3 2\n255\n") && ppm.ends_with(&[0x12, 0x34, 0x56]));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        write_picture(&frame, PictureFormat::Png, &path).unwrap();
        let decoder = png::Decoder::new(io::BufReader::new(std::fs::File::open(path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels[15..], [0x12, 0x34, 0x56]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_picture(&frame, PictureFormat::Png, &dir.path().join("no/x.png")).is_err());
    }
}
