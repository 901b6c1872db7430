//! Builds a Debian disk: `cargo run --release -p guest --example debian -- debian:12 DIRECTORY [PACKAGE...]`.

use guest::debian::{Options, Release, disk};

struct Print;

impl guest::Progress for Print {
    fn step(&mut self, text: &str) {
        eprintln!("{text}");
    }
    fn bytes(&mut self, _: u64, _: Option<u64>) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let name = args.next().ok_or("which release?")?;
    let directory = args.next().ok_or("which directory?")?;
    let release = Release::parse(&name)?.ok_or("not a release of Debian")?;
    let options = Options { packages: args.collect(), ..Options::default() };
    println!("{}", disk(&release, &options, directory.as_ref(), &mut Print)?.display());
    Ok(())
}
