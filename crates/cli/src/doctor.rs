//! `kvasir doctor`.

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<u8, Failure> {
    let report = advise::doctor();
    if args.json {
        let json = serde_json::to_string_pretty(&report).map_err(Failure::usage)?;
        println!("{json}");
    } else {
        print!("{report}");
    }
    Ok(0)
}
