//! Names of images and lists of options, as users, image files and other programs give them.
#![no_main]

use block::{
    Options,
    storage::{Location, join_name, parse_json_name},
};
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;

fuzz_target!(|text: &str| {
    let _ = Location::parse(text);
    let _ = parse_json_name(text);
    let _ = block::parse_size(text);
    let (base, name) = text.split_once('\n').unwrap_or((text, text));
    let _ = join_name(base, name);
    if let Ok(options) = Options::parse(text) {
        let mut map = options.clone().into_map();
        let _ = Location::from_options(&mut map, &BTreeMap::new(), &BTreeMap::new());
        let _ = block::Limits::take(&mut options.clone());
        let _ = block::secret::load(&mut options.clone(), &BTreeMap::new());
        let _ = block::nbd::TlsCredentials::take(&mut options.clone());
    }
});
