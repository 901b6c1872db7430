//! Progress of long work, on the terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// A line that says what is being done, and a bar where it is known how far.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl guest::Progress for Bar {
    fn step(&mut self, text: &str) {
        if self.0.is_hidden() {
            // No terminal: a line for each step.
            eprintln!("kvasir: {text}");
        }
        self.0.set_style(ProgressStyle::default_spinner());
        self.0.set_message(text.to_owned());
    }

    fn bytes(&mut self, done: u64, total: Option<u64>) {
        if let Some(total) = total
            && self.0.length() != Some(total)
        {
            // The template is a constant: where it is wrong, the default style is as good.
            if let Ok(style) = ProgressStyle::with_template(
                "{spinner} {msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}",
            ) {
                self.0.set_style(style);
            }
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }
}
