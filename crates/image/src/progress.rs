//! Progress of long work: qemu-img's line of numbers, or a bar.

use crate::Personality;
use std::{
    io::Write,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// Shows how much of `total` is done. Any thread may report.
pub(crate) struct Progress {
    total: u64,
    done: AtomicU64,
    shown: Mutex<f64>,
    style: Style,
}

enum Style {
    Silent,
    Line,
    Bar(indicatif::ProgressBar),
}

impl Progress {
    /// `wanted`: the user asked for progress.
    pub(crate) fn new(total: u64, wanted: bool, personality: Personality) -> Self {
        let style = match (wanted, personality) {
            (false, _) => Style::Silent,
            (true, Personality::Kvasir) => {
                let bar = indicatif::ProgressBar::new(total);
                let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
                if let Ok(shape) = indicatif::ProgressStyle::with_template(template) {
                    bar.set_style(shape);
                }
                Style::Bar(bar)
            }
            (true, _) => Style::Line,
        };
        let progress =
            Progress { total: total.max(1), done: AtomicU64::new(0), shown: Mutex::new(-100.0), style };
        progress.add(0);
        progress
    }

    /// `amount` more is done.
    pub(crate) fn add(&self, amount: u64) {
        let done = self.done.fetch_add(amount, Ordering::Relaxed) + amount;
        match &self.style {
            Style::Silent => {}
            Style::Bar(bar) => bar.set_position(done),
            Style::Line => {
                let percent = (done as f64 * 100.0 / self.total as f64).min(100.0);
                let mut shown = self.shown.lock().unwrap_or_else(|e| e.into_inner());
                if percent - *shown >= 1.0 {
                    *shown = percent;
                    print!("    ({percent:.2}/100%)\r");
                    // Nobody is served by failing because a progress line could not be shown.
                    let _ = std::io::stdout().flush();
                }
            }
        }
    }

    /// The work is over.
    pub(crate) fn finish(self) {
        match self.style {
            Style::Silent => {}
            Style::Bar(bar) => bar.finish_and_clear(),
            Style::Line => println!("    (100.00/100%)"),
        }
    }
}
