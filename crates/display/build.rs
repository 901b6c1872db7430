//! Embeds the noVNC page, where the npm package has been fetched (`cargo xtask novnc`, or `npm ci` in `page/`).

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.filter_map(|e| e.ok()).map(|e| e.path()) {
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|e| e == "js") {
            out.push(path);
        }
    }
}

fn main() {
    let page = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("page");
    let package = page.join("node_modules/@novnc/novnc");
    println!("cargo::rerun-if-changed={}", page.join("index.html").display());
    println!("cargo::rerun-if-changed={}", package.join("package.json").display());
    let mut text = String::from("/// Files of the page.\npub(super) const FILES: &[File] = &[\n");
    if package.join("core/rfb.js").is_file() {
        let mut add = |url: &str, kind: &str, path: &Path| {
            let path = path.display().to_string();
            writeln!(text, "    File {{ path: {url:?}, kind: {kind:?}, data: include_bytes!({path:?}) }},")
                .expect("writing to a string");
        };
        add("/index.html", "text/html; charset=utf-8", &page.join("index.html"));
        let mut scripts = Vec::new();
        collect(&package.join("core"), &mut scripts);
        collect(&package.join("vendor"), &mut scripts);
        scripts.sort();
        for path in scripts {
            let below = path.strip_prefix(&package).expect("found below").display().to_string();
            add(&format!("/novnc/{below}"), "text/javascript; charset=utf-8", &path);
        }
        let licence = package.join("LICENSE.txt");
        if licence.is_file() {
            add("/novnc/LICENSE.txt", "text/plain; charset=utf-8", &licence);
        }
    }
    text.push_str("];\n");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("page.rs");
    fs::write(out, text).expect("the output directory can be written");
}
