//! `bitmap`.

use super::{Context, Outcome};
use crate::args::{self, Source};
use block::{Error, Image, OpenOptions, Result};
use clap::{ArgAction, ArgMatches, Command};

/// Actions keep the order in which they are given, which clap's derived structures lose.
pub(crate) struct Args {
    source: Source,
    format: Option<String>,
    granularity: Option<String>,
    source_file: Option<String>,
    source_format: Option<String>,
    filename: String,
    bitmap: String,
    actions: Vec<Action>,
}

#[derive(Clone)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl clap::Args for Args {
    fn augment_args(command: Command) -> Command {
        let flag = |name: &'static str, help: &'static str| {
            clap::Arg::new(name)
                .long(name)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("on")
                .help(help)
        };
        let value = |name: &'static str, short: char, help: &'static str| {
            clap::Arg::new(name).long(name).short(short).help(help)
        };
        Source::augment_args(command)
            .arg(flag("add", "Add the bitmap"))
            .arg(flag("remove", "Remove the bitmap"))
            .arg(flag("clear", "Clear all bits"))
            .arg(flag("enable", "Record writes from now on"))
            .arg(flag("disable", "Record no more writes"))
            .arg(
                clap::Arg::new("merge")
                    .long("merge")
                    .action(ArgAction::Append)
                    .help("Add the bits of another bitmap"),
            )
            .arg(value("granularity", 'g', "Bytes per bit, for --add"))
            .arg(value("source-file", 'b', "Image with the bitmap to merge"))
            .arg(value("source-format", 'F', "Its format"))
            .arg(value("format", 'f', "Format"))
            .arg(clap::Arg::new("filename").required(true).help("Image"))
            .arg(clap::Arg::new("bitmap").required(true).help("Name of the bitmap"))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Args {
    fn from_arg_matches(m: &ArgMatches) -> Result<Self, clap::Error> {
        let mut actions: Vec<(usize, Action)> = Vec::new();
        let flags = [
            ("add", Action::Add),
            ("remove", Action::Remove),
            ("clear", Action::Clear),
            ("enable", Action::Enable),
            ("disable", Action::Disable),
        ];
        for (name, action) in flags {
            if m.value_source(name) == Some(clap::parser::ValueSource::CommandLine) {
                actions.extend(m.indices_of(name).into_iter().flatten().map(|i| (i, action.clone())));
            }
        }
        let merged = m.get_many::<String>("merge").into_iter().flatten();
        actions.extend(
            m.indices_of("merge")
                .into_iter()
                .flatten()
                .zip(merged)
                .map(|(i, s)| (i, Action::Merge(s.clone()))),
        );
        actions.sort_by_key(|a| a.0);
        let text = |name: &str| m.get_one::<String>(name).cloned();
        Ok(Args {
            source: Source::from_arg_matches(m)?,
            format: text("format"),
            granularity: text("granularity"),
            source_file: text("source-file"),
            source_format: text("source-format"),
            filename: text("filename").unwrap_or_default(),
            bitmap: text("bitmap").unwrap_or_default(),
            actions: actions.into_iter().map(|a| a.1).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, m: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(m)?;
        Ok(())
    }
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Action::Add => "add",
            Action::Remove => "remove",
            Action::Clear => "clear",
            Action::Enable => "enable",
            Action::Disable => "disable",
            Action::Merge(_) => "merge",
        }
    }
}

/// Bits at one granularity, spread or gathered to another.
fn regrain(bits: &[u8], from: u64, to: u64, size: u64) -> Vec<u8> {
    let mut out = vec![0u8; size.div_ceil(to).div_ceil(8) as usize];
    for (i, _) in bits.iter().enumerate().filter(|(_, b)| **b != 0) {
        for bit in (i as u64 * 8..i as u64 * 8 + 8).filter(|b| bits[i] >> (b % 8) & 1 != 0) {
            let end = ((bit + 1) * from).min(size);
            if bit * from >= end {
                continue;
            }
            for target in bit * from / to..=(end - 1) / to {
                out[(target / 8) as usize] |= 1 << (target % 8);
            }
        }
    }
    out
}

fn merge(image: &Image, target: &str, source: &Image, name: &str) -> Result<()> {
    let none = || Error::unsupported("The image's format has no bitmaps");
    let grain = |image: &Image, name: &str| -> Result<u64> {
        let list = image.format().bitmaps().ok_or_else(none)?.list();
        let found = list.iter().find(|b| b.name == name);
        found
            .map(|b| b.granularity)
            .ok_or_else(|| Error::NotFound(format!("Dirty bitmap '{name}' not found")))
    };
    let (to, from) = (grain(image, target)?, grain(source, name)?);
    if image.size() != source.size() {
        return Err(Error::usage(format!(
            "Bitmaps are of different sizes (destination size is {} and source size is {}) and can't be merged",
            image.size(),
            source.size()
        )));
    }
    let bits = source.format().bitmaps().ok_or_else(none)?.load(name)?;
    let bits = regrain(&bits, from, to, image.size());
    image.quiesced(|f| {
        let bitmaps = f.bitmaps().ok_or_else(none)?;
        let mut sum = bitmaps.load(target)?;
        sum.iter_mut().zip(bits).for_each(|(a, b)| *a |= b);
        bitmaps.store(target, &sum)
    })
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    if a.actions.is_empty() {
        return Err(Error::usage(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        )
        .into());
    }
    if a.granularity.is_some() && !a.actions.iter().any(|x| matches!(x, Action::Add)) {
        return Err(Error::usage("granularity only supported with --add").into());
    }
    let granularity = a.granularity.as_deref().map(|g| args::parse_size(g, "granularity")).transpose()?;
    let options = OpenOptions { no_backing: true, ..Default::default() };
    let image = a.source.open(&a.filename, a.format.as_deref(), options)?;
    let source = match &a.source_file {
        Some(name) => {
            let options = OpenOptions { no_backing: true, ..OpenOptions::reader(None) };
            Some(Source::default().open(name, a.source_format.as_deref(), options)?)
        }
        None => None,
    };
    let name = &a.bitmap;
    for action in &a.actions {
        let done = if let Action::Merge(from) = action {
            merge(&image, name, source.as_ref().unwrap_or(&image), from)
        } else {
            image.quiesced(|f| {
                let bitmaps =
                    f.bitmaps().ok_or_else(|| Error::unsupported("The image's format has no bitmaps"))?;
                match action {
                    Action::Add => bitmaps.add(name, granularity, true),
                    Action::Remove => bitmaps.remove(name),
                    Action::Clear => bitmaps.load(name).and_then(|b| bitmaps.store(name, &vec![0; b.len()])),
                    Action::Enable => bitmaps.set_enabled(name, true),
                    Action::Disable => bitmaps.set_enabled(name, false),
                    Action::Merge(_) => Ok(()),
                }
            })
        };
        done.map_err(|e| e.context(format!("Operation {} on bitmap {name} failed", action.name())))?;
    }
    Ok(image.close()?)
}

#[cfg(test)]
mod tests {
    use super::regrain;

    #[test]
    fn bits_change_granularity() {
        assert_eq!(regrain(&[0b10], 4096, 1024, 16384), [0b1111_0000, 0]);
        assert_eq!(regrain(&[0b1111_0000, 0], 1024, 4096, 16384), [0b10]);
        assert_eq!(regrain(&[0xff], 1024, 1024, 3000), [0b111]);
    }
}
