//! `map`.

use super::{Context, Outcome};
use crate::args::{self, Output, Source};
use block::{Error, Image, MapEntry, OpenOptions, Result};
use std::io::Write;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// First byte to show.
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// How many bytes to show.
    #[arg(short = 'l', long, value_name = "LEN")]
    max_length: Option<String>,
    /// Output format.
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Image.
    filename: String,
}

/// Calls `f` with merged entries of a range.
pub(crate) fn for_each(
    image: &Image,
    start: u64,
    end: u64,
    mut f: impl FnMut(&MapEntry) -> Result<()>,
) -> Result<()> {
    let mut at = start;
    let mut pending: Option<MapEntry> = None;
    let mut entries = Vec::new();
    while at < end {
        entries.clear();
        image.map(at, end - at, &mut entries)?;
        for e in &entries {
            at = e.start + e.length;
            if let Some(p) = &mut pending {
                let same = (p.depth, p.present, p.zero, p.data, p.compressed, p.file)
                    == (e.depth, e.present, e.zero, e.data, e.compressed, e.file);
                let follows = match (p.offset, e.offset) {
                    (Some(a), Some(b)) => a + p.length == b,
                    (None, None) => true,
                    _ => false,
                };
                if same && follows {
                    p.length += e.length;
                    continue;
                }
                f(p)?;
            }
            pending = Some(*e);
        }
    }
    pending.iter().try_for_each(f)
}

/// Name of the file that an entry lies in.
fn file_of(image: &Image, e: &MapEntry) -> String {
    let mut depth = e.depth;
    let mut below: Option<std::sync::Arc<Image>> = None;
    while depth > 0 {
        below = below.as_deref().map_or_else(|| image.backing(), Image::backing);
        depth -= 1;
    }
    let owner = below.as_deref().unwrap_or(image);
    owner.format().storages().get(usize::from(e.file)).map(|s| s.name()).unwrap_or_default()
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let image = a.source.open(&a.filename, a.format.as_deref(), OpenOptions::reader(None))?;
    let start = a.start_offset.map(|s| args::parse_size(&s, "start offset")).transpose()?.unwrap_or(0);
    let len = a.max_length.map(|s| args::parse_size(&s, "max length")).transpose()?;
    let end = len.map_or(image.size(), |l| start.saturating_add(l).min(image.size()));
    let mut out = std::io::BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let failed = |e: std::io::Error| Error::io("Could not write the map", e);
    if a.output == Output::Human {
        writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to").map_err(failed)?;
        for_each(&image, start, end, |e| {
            if !e.data || e.zero {
                return Ok(());
            }
            let Some(offset) = e.offset else {
                return Err(Error::unsupported("File contains external, encrypted or compressed clusters."));
            };
            writeln!(
                out,
                "{:<#16x}{:<#16x}{:<#16x}{}",
                Hex(e.start),
                Hex(e.length),
                Hex(offset),
                file_of(&image, e)
            )
            .map_err(failed)
        })?;
        return Ok(out.flush().map_err(failed)?);
    }
    let mut first = true;
    let mut line = Vec::with_capacity(256);
    for_each(&image, start, end, |e| {
        line.clear();
        line.extend(if std::mem::take(&mut first) { &b"[{ \"start\": "[..] } else { b",\n{ \"start\": " });
        // Images have millions of these: numbers are written without the machinery of formatting.
        push_number(&mut line, e.start);
        line.extend(b", \"length\": ");
        push_number(&mut line, e.length);
        line.extend(b", \"depth\": ");
        push_number(&mut line, u64::from(e.depth));
        for (name, value) in [
            (", \"present\": ", e.present),
            (", \"zero\": ", e.zero),
            (", \"data\": ", e.data),
            (", \"compressed\": ", e.compressed),
        ] {
            line.extend(name.as_bytes());
            line.extend(if value { &b"true"[..] } else { b"false" });
        }
        if let Some(offset) = e.offset {
            line.extend(b", \"offset\": ");
            push_number(&mut line, offset);
        }
        line.push(b'}');
        out.write_all(&line).map_err(failed)
    })?;
    writeln!(out, "{}", if first { "[]" } else { "]" }).map_err(failed)?;
    Ok(out.flush().map_err(failed)?)
}

/// Appends a number in decimal.
fn push_number(out: &mut Vec<u8>, mut number: u64) {
    let (mut digits, mut at) = ([0; 20], 20);
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend(&digits[at..]);
}

/// C's `%#x`, which writes zero without the prefix.
struct Hex(u64);

impl std::fmt::LowerHex for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = if self.0 == 0 { "0".to_owned() } else { format!("{:#x}", self.0) };
        write!(f, "{text:<width$}", width = f.width().unwrap_or(0))
    }
}
