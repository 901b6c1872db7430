//! `info`.

use super::{Context, Outcome};
use crate::{
    args::{Output, Source},
    json, text,
};
use block::{
    Image, OpenOptions, Result,
    storage::{self, Storage},
};
use serde_json::{Map, Value, json};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Show the whole backing chain.
    #[arg(long)]
    backing_chain: bool,
    /// Output format.
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Limits are accepted and ignored where they cannot apply.
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Image.
    filename: String,
}

/// What `info` shows of a file below an image.
fn storage_info(storage: &dyn Storage) -> Result<Value> {
    let mut info = json!({
        "children": [],
        "virtual-size": storage.size()?,
        "filename": storage.name(),
        "format": storage.protocol(),
        "format-specific": { "type": storage.protocol(), "data": {} },
        "dirty-flag": false,
    });
    if let Some(size) = storage.allocated_size() {
        info["actual-size"] = size.into();
    }
    Ok(info)
}

fn image_info(image: &Image) -> Result<Value> {
    let info = image.info()?;
    let mut children = vec![json!({ "name": "file", "info": storage_info(&**image.storage())? })];
    for (name, index) in &info.children {
        if let Some(storage) = image.format().storages().get(*index) {
            children.push(json!({ "name": name, "info": storage_info(&**storage)? }));
        }
    }
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| drop(out.insert(key.into(), value));
    put("children", children.into());
    put("virtual-size", image.size().into());
    put("filename", image.name().into());
    put("format", image.driver().name.into());
    put("dirty-flag", info.dirty.into());
    if let Some(size) = image.storage().allocated_size() {
        put("actual-size", size.into());
    }
    if let Some(size) = info.cluster_size {
        put("cluster-size", size.into());
    }
    if info.encrypted {
        put("encrypted", true.into());
    }
    if info.compressed {
        put("compressed", true.into());
    }
    if let Some(backing) = &info.backing {
        put("backing-filename", backing.name.as_str().into());
        put("full-backing-filename", storage::join_name(image.name(), &backing.name).into());
        if let Some(format) = &backing.format {
            put("backing-filename-format", format.as_str().into());
        }
    }
    if let Some(specific) = info.specific {
        put("format-specific", json!({ "type": image.driver().name, "data": specific }));
    }
    let snapshots: Vec<Value> = image
        .format()
        .snapshots()
        .map(|s| s.list())
        .unwrap_or_default()
        .into_iter()
        .map(|s| {
            let mut v = json!({
                "id": s.id, "name": s.name, "vm-state-size": s.vm_state_size, "date-sec": s.date_sec,
                "date-nsec": s.date_nsec, "vm-clock-sec": s.vm_clock_nsec / 1_000_000_000,
                "vm-clock-nsec": s.vm_clock_nsec % 1_000_000_000,
            });
            if let Some(icount) = s.icount {
                v["icount"] = icount.into();
            }
            v
        })
        .collect();
    if !snapshots.is_empty() {
        put("snapshots", snapshots.into());
    }
    Ok(out.into())
}

/// Prints a value of format-specific information, indented.
fn dump(value: &Value, indent: usize) {
    let pad = " ".repeat(indent * 4);
    let line = |name: String, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => {
            println!("{pad}{name}:");
            dump(value, indent + 1);
        }
        Value::String(s) => println!("{pad}{name}: {s}"),
        other => println!("{pad}{name}: {other}"),
    };
    match value {
        Value::Object(map) => json::ordered(map).into_iter().for_each(|(k, v)| line(k.replace('-', " "), v)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| line(format!("[{i}]"), v)),
        _ => {}
    }
}

fn size_line(value: &Value) -> String {
    let bytes = value.as_u64().unwrap_or(0);
    format!("{} ({bytes} bytes)", text::size(bytes))
}

fn print_human(info: &Value, image: &Image) {
    let text_of = |key: &str| info[key].as_str().unwrap_or_default();
    println!("image: {}", text_of("filename"));
    println!("file format: {}", text_of("format"));
    println!("virtual size: {}", size_line(&info["virtual-size"]));
    match info["actual-size"].as_u64() {
        Some(size) => println!("disk size: {}", text::size(size)),
        None => println!("disk size: unavailable"),
    }
    if info["encrypted"] == true {
        println!("encrypted: yes");
    }
    if let Some(size) = info["cluster-size"].as_u64() {
        println!("cluster_size: {size}");
    }
    if info["dirty-flag"] == true {
        println!("cleanly shut down: no");
    }
    if let Some(backing) = info["backing-filename"].as_str() {
        let full = text_of("full-backing-filename");
        if full == backing {
            println!("backing file: {backing}");
        } else {
            println!("backing file: {backing} (actual path: {full})");
        }
        if let Some(format) = info["backing-filename-format"].as_str() {
            println!("backing file format: {format}");
        }
    }
    if let Some(snapshots) = image.format().snapshots() {
        let list = snapshots.list();
        if !list.is_empty() {
            print!("{}", text::snapshots(&list));
        }
    }
    if let Some(data) =
        info["format-specific"].get("data").filter(|d| d.as_object().is_some_and(|m| !m.is_empty()))
    {
        println!("Format specific information:");
        dump(data, 1);
    }
    for child in info["children"].as_array().into_iter().flatten() {
        let (name, file) = (&child["name"], &child["info"]);
        println!("Child node '/{}':", name.as_str().unwrap_or_default());
        println!("    filename: {}", file["filename"].as_str().unwrap_or_default());
        println!("    protocol type: {}", file["format"].as_str().unwrap_or_default());
        println!("    file length: {}", size_line(&file["virtual-size"]));
        match file["actual-size"].as_u64() {
            Some(size) => println!("    disk size: {}", text::size(size)),
            None => println!("    disk size: unavailable"),
        }
    }
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    let options = OpenOptions { no_io: true, no_backing: true, ..OpenOptions::reader(None) };
    let mut image = a.source.open(&a.filename, a.format.as_deref(), options.clone())?;
    let mut infos = Vec::new();
    let mut seen = vec![image.name().to_owned()];
    loop {
        let info = image_info(&image)?;
        if a.output == Output::Human {
            if !infos.is_empty() {
                println!();
            }
            print_human(&info, &image);
        }
        let next = info["full-backing-filename"].as_str().map(str::to_owned);
        let format = info["backing-filename-format"].as_str().map(str::to_owned);
        infos.push(info);
        let Some(name) = next.filter(|_| a.backing_chain) else { break };
        if seen.contains(&name) {
            return Err(
                block::Error::invalid(format!("Backing file '{name}' creates an infinite loop.")).into()
            );
        }
        seen.push(name.clone());
        let plain = Source { image_opts: false, ..a.source.clone() };
        image = plain.open(&name, format.as_deref(), options.clone())?;
    }
    if a.output == Output::Json {
        let value = if a.backing_chain { Value::Array(infos) } else { infos.swap_remove(0) };
        println!("{}", json::pretty(&value));
    }
    Ok(())
}
