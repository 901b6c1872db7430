//! `create`.

use super::{Context, Outcome};
use crate::args::{self, Source};
use block::{
    Create, Error, OptionKind, OptionSpec, Options, Result, create_image,
    formats::{self, Backing, Driver},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print nothing.
    #[arg(short, long)]
    quiet: bool,
    /// Format.
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Backing file.
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// Format of the backing file.
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look whether the backing file is there.
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_backing: bool,
    /// Format options, name=value,...; -o help lists them.
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Define an object, such as secret,id=x,file=path.
    #[arg(long, value_name = "OBJECTDEF")]
    object: Vec<String>,
    /// File to create.
    filename: Option<String>,
    /// Size of the disk.
    size: Option<String>,
}

/// Options every format takes here.
const COMMON: [OptionSpec; 3] = [
    OptionSpec {
        name: "backing_file",
        kind: OptionKind::Text,
        help: "File name of a base image",
        default: None,
    },
    OptionSpec {
        name: "backing_fmt",
        kind: OptionKind::Text,
        help: "Image format of the base image",
        default: None,
    },
    OptionSpec { name: "size", kind: OptionKind::Size, help: "Virtual disk size", default: None },
];

/// The list that `-o help` prints.
pub(crate) fn print_options(driver: &Driver) {
    println!("Supported {} options:", driver.name);
    let mut all: Vec<&OptionSpec> = driver.options.iter().collect();
    all.extend(COMMON.iter().filter(|o| driver.backing || o.name == "size"));
    all.sort_by_key(|o| o.name);
    for o in all {
        let kind = match o.kind {
            OptionKind::Size => "<size>",
            OptionKind::Bool => "<bool (on/off)>",
            OptionKind::Number => "<num>",
            OptionKind::Text => "<str>",
        };
        println!("  {:<22} - {}", format!("{}={kind}", o.name), o.help);
    }
    println!(
        "\nThe protocol level may support further options.\nSpecify the target filename to include those options."
    );
}

/// Order in which qcow2's options are announced.
const QCOW2_ORDER: [&str; 12] = [
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "size",
    "compat",
    "data_file",
    "data_file_raw",
    "backing_file",
    "backing_fmt",
    "lazy_refcounts",
    "refcount_bits",
];

/// `fmt=qcow2 cluster_size=65536 ...`.
fn describe(driver: &Driver, size: u64, backing: Option<&Backing>, options: &Options) -> String {
    let value = |name: &str| -> Option<String> {
        match name {
            "size" => Some(size.to_string()),
            "backing_file" => backing.map(|b| b.name.clone()),
            "backing_fmt" => backing.and_then(|b| b.format.clone()),
            _ => {
                let spec = driver.options.iter().find(|o| o.name == name)?;
                let given = options.get(name).map(str::to_owned).or(spec.default.map(str::to_owned))?;
                Some(match spec.kind {
                    OptionKind::Size => block::parse_size(&given).map_or(given, |n| n.to_string()),
                    _ => given,
                })
            }
        }
    };
    let mut names: Vec<&str> = Vec::new();
    if driver.name == "qcow2" {
        names.extend(["encrypt.format", "encrypt.key-secret", "encrypt.iter-time"]);
        names.extend(QCOW2_ORDER);
    } else {
        names.extend(["size", "backing_file", "backing_fmt"]);
    }
    let rest: Vec<&str> = driver.options.iter().map(|o| o.name).filter(|n| !names.contains(n)).collect();
    names.extend(rest);
    let mut text = format!("fmt={}", driver.name);
    for name in names {
        if let Some(v) = value(name) {
            text.push_str(&format!(" {name}={}", quote(&v)));
        }
    }
    text
}

/// Values with odd characters are quoted as in QEMU's option lists.
fn quote(value: &str) -> String {
    value.replace(',', ",,")
}

/// Collects `-o` lists; `None` if help was asked for.
pub(crate) fn collect(lists: &[String]) -> Result<Option<Options>> {
    let mut options = Options::new();
    for list in lists {
        if list.split(',').any(|o| o == "help" || o == "?") {
            return Ok(None);
        }
        options.extend_parsed(list)?;
    }
    Ok(Some(options))
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let driver = formats::find(&a.format).ok_or_else(|| {
        let prefix = a.filename.as_ref().map(|n| format!("{n}: ")).unwrap_or_default();
        Error::usage(format!("{prefix}Unknown file format '{}'", a.format))
    })?;
    let Some(mut options) = collect(&a.options)? else {
        print_options(driver);
        return Ok(());
    };
    let name = a.filename.ok_or_else(|| Error::usage("Expecting image file name"))?;
    let mut size = a.size.map(|s| args::parse_size(&s, "image size")).transpose()?;
    if let Some(given) = options.take_size("size")? {
        size = size.or(Some(given));
    }
    for (option, _) in options.iter() {
        if !driver.options.iter().any(|o| o.name == option) && !COMMON.iter().any(|o| o.name == option) {
            return Err(Error::usage(format!("{name}: Invalid parameter '{option}'")).into());
        }
    }
    let backing_name = a.backing.or(options.take("backing_file")).filter(|n| !n.is_empty());
    let backing_format = a.backing_format.or(options.take("backing_fmt"));
    let backing = match (backing_name, backing_format) {
        (Some(_), None) if !a.unsafe_backing => {
            return Err(Error::usage(format!(
                "{name}: Backing file specified without backing format; say it with -F"
            ))
            .into());
        }
        (Some(name), format) => Some(Backing { name, format }),
        (None, Some(_)) => {
            return Err(
                Error::usage(format!("{name}: Backing format cannot be used without backing file")).into()
            );
        }
        (None, None) => None,
    };
    if let Some(format) = backing.as_ref().and_then(|b| b.format.as_deref())
        && formats::find(format).is_none()
    {
        return Err(Error::usage(format!("{name}: Unknown backing file format '{format}'")).into());
    }
    let secrets = Source { object: a.object, ..Default::default() }.secrets()?;
    let shown = options.clone();
    let create = Create {
        format: a.format,
        name: name.clone(),
        size,
        backing: backing.clone(),
        unsafe_backing: a.unsafe_backing,
        options,
        secrets,
    };
    let size = create_image(&create).map_err(|e| e.context(name.clone()))?;
    if !a.quiet {
        println!(
            "Formatting '{name}', {}",
            describe(driver, size.next_multiple_of(512), backing.as_ref(), &shown)
        );
    }
    Ok(())
}
