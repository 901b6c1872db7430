//! The table, its JSON and its picture.

use serde_json::{Value, json};

use super::rows::{Goal, Row};
use super::run::Measure;

/// What a rate is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Clock {
    /// Processor time of the monitor, which other work on the machine hardly changes
    Cpu,
    /// The clock on the wall, for a quiet machine
    Wall,
}

/// One row's results: here, in Kvasir, and in each QEMU.
#[derive(Debug)]
pub struct Line {
    pub row: &'static Row,
    pub native: Option<Measure>,
    pub kvasir: Option<Measure>,
    pub tcg: Vec<Option<Measure>>,
}

/// The figure of a measure: a rate, or what was asked for directly.
fn figure(row: &Row, measure: Measure, clock: Clock) -> f64 {
    match row.goal {
        Goal::Times(_) => match clock {
            Clock::Cpu => measure.units / measure.cpu,
            Clock::Wall => measure.units / measure.seconds,
        },
        Goal::Faster(_) => match clock {
            Clock::Cpu => measure.cpu,
            Clock::Wall => measure.seconds,
        },
        Goal::Scaling(_) | Goal::Percent(_) | Goal::Mebibytes(_) => measure.units,
    }
}

impl Line {
    fn best_tcg(&self, clock: Clock) -> Option<f64> {
        let figures = self.tcg.iter().flatten().map(|measure| figure(self.row, *measure, clock));
        match self.row.goal {
            Goal::Times(_) | Goal::Scaling(_) => figures.reduce(f64::max),
            _ => figures.reduce(f64::min),
        }
    }

    /// Kvasir beside the better TCG: more is better.
    fn ratio(&self, clock: Clock) -> Option<f64> {
        let (ours, theirs) = (figure(self.row, self.kvasir?, clock), self.best_tcg(clock)?);
        let ratio = match self.row.goal {
            Goal::Times(_) | Goal::Scaling(_) => ours / theirs,
            _ => theirs / ours,
        };
        ratio.is_finite().then_some(ratio)
    }

    fn met(&self, clock: Clock) -> Option<bool> {
        let ours = figure(self.row, self.kvasir?, clock);
        Some(match self.row.goal {
            Goal::Times(least) | Goal::Faster(least) => self.ratio(clock)? >= least,
            Goal::Scaling(least) => ours >= least,
            Goal::Percent(most) | Goal::Mebibytes(most) => ours <= most,
        })
    }

    fn target(&self) -> String {
        match self.row.goal {
            Goal::Times(least) | Goal::Faster(least) => format!("{least}"),
            Goal::Scaling(least) => format!("≥ {least}"),
            Goal::Percent(most) => format!("≤ {most} %"),
            Goal::Mebibytes(most) => format!("≤ {most} MiB"),
        }
    }

    fn cell(&self, measure: Option<Measure>, clock: Clock) -> String {
        let Some(measure) = measure else { return "-".into() };
        let value = figure(self.row, measure, clock);
        match self.row.goal {
            Goal::Times(_) => format!("{} {}/s", scaled(value), self.row.unit),
            Goal::Faster(_) => format!("{value:.2} s"),
            Goal::Scaling(_) => format!("{value:.2}"),
            Goal::Percent(_) => format!("{value:.2} %"),
            Goal::Mebibytes(_) => format!("{value:.0} MiB"),
        }
    }
}

/// Three digits and a prefix of thousands.
fn scaled(value: f64) -> String {
    let (mut value, mut prefix) = (value, "");
    for next in ["k", "M", "G", "T"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = next;
    }
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {prefix}").trim_end().to_owned()
}

/// The table in Markdown. `versions` are the QEMUs'.
pub fn table(lines: &[Line], versions: &[String], clock: Clock) -> String {
    let mut text = String::from("| work | native | Kvasir |");
    for version in versions {
        text += &format!(" TCG {version} |");
    }
    text += " of native | of the better TCG | target | met |\n| --- | ---: | ---: |";
    text += &" ---: |".repeat(versions.len());
    text += " ---: | ---: | ---: | --- |\n";
    for line in lines {
        let mut cells = vec![line.row.about.to_owned()];
        cells.push(line.cell(line.native, clock));
        cells.push(line.cell(line.kvasir, clock));
        cells.extend(line.tcg.iter().map(|measure| line.cell(*measure, clock)));
        let of_native = match (line.native, line.kvasir) {
            (Some(native), Some(ours)) => {
                let slower = figure(line.row, native, clock) / figure(line.row, ours, clock);
                if slower >= 1.05 { format!("1/{slower:.1}") } else { format!("{:.2}", 1.0 / slower) }
            }
            _ => "-".into(),
        };
        cells.push(of_native);
        cells.push(line.ratio(clock).map_or("-".into(), |ratio| format!("{ratio:.2}")));
        cells.push(line.target());
        cells.push(match line.met(clock) {
            Some(true) => "yes".into(),
            Some(false) => "**no**".into(),
            None => "-".into(),
        });
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

/// Everything, for programs.
pub fn to_json(lines: &[Line], versions: &[String], clock: Clock) -> Value {
    let measure = |measure: Option<Measure>| {
        measure.map(|m| json!({"units": m.units, "seconds": m.seconds, "cpu-seconds": m.cpu}))
    };
    let rows: Vec<Value> = lines
        .iter()
        .map(|line| {
            let tcg: serde_json::Map<String, Value> = versions
                .iter()
                .zip(&line.tcg)
                .map(|(version, result)| (version.clone(), json!(measure(*result))))
                .collect();
            json!({
                "row": line.row.name,
                "about": line.row.about,
                "unit": line.row.unit,
                "native": measure(line.native),
                "kvasir": measure(line.kvasir),
                "tcg": tcg,
                "ratio": line.ratio(clock),
                "target": line.target(),
                "met": line.met(clock),
            })
        })
        .collect();
    json!({"clock": format!("{clock:?}").to_lowercase(), "qemu": versions, "rows": rows})
}

/// A picture: for each row, Kvasir's and the better TCG's speed as parts of native, on a logarithmic scale.
pub fn chart(lines: &[Line], clock: Clock) -> String {
    const LEFT: f64 = 290.0;
    const WIDTH: f64 = 560.0;
    const ROW: f64 = 26.0;
    const TOP: f64 = 54.0;
    // Four decades, from 1/10000 to 1.
    let place = |part: f64| LEFT + WIDTH * (1.0 + part.clamp(1e-4, 1.0).log10() / 4.0);
    let shown: Vec<(&Line, f64, f64)> = lines
        .iter()
        .filter_map(|line| {
            let Goal::Times(_) = line.row.goal else { return None };
            let native = figure(line.row, line.native?, clock);
            Some((line, figure(line.row, line.kvasir?, clock) / native, line.best_tcg(clock)? / native))
        })
        .collect();
    let height = TOP + ROW * shown.len() as f64 + 16.0;
    let total = LEFT + WIDTH + 80.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {total:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"16\">Speed as part of native: Kvasir's software CPU and QEMU's TCG</text>\n"
    );
    for (part, label) in
        [(1e-4, "1/10000"), (1e-3, "1/1000"), (1e-2, "1/100"), (1e-1, "1/10"), (1.0, "native")]
    {
        let x = place(part);
        svg += &format!(
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{height:.1}\" stroke=\"#ccc\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{label}</text>\n",
            TOP - 4.0,
            TOP - 8.0
        );
    }
    for (index, (line, ours, theirs)) in shown.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        svg += &format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 8.0,
            y + 17.0,
            escaped(line.row.about)
        );
        for (part, colour, offset) in [(*ours, "#2563a8", 4.0), (*theirs, "#d98a2b", 13.0)] {
            svg += &format!(
                "<rect x=\"{LEFT:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"8\" fill=\"{colour}\"/>\n",
                y + offset,
                place(part) - LEFT
            );
        }
        svg += &format!(
            "<text x=\"{:.1}\" y=\"{:.1}\">{:.1}×</text>\n",
            LEFT + WIDTH + 10.0,
            y + 17.0,
            ours / theirs
        );
    }
    svg + &format!(
        "<rect x=\"{0:.1}\" y=\"14\" width=\"12\" height=\"8\" fill=\"#2563a8\"/><text x=\"{1:.1}\" y=\"23\">Kvasir</text>\
         <rect x=\"{2:.1}\" y=\"14\" width=\"12\" height=\"8\" fill=\"#d98a2b\"/><text x=\"{3:.1}\" y=\"23\">TCG</text>\n</svg>\n",
        total - 170.0,
        total - 152.0,
        total - 90.0,
        total - 72.0
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::softcpu::rows::ROWS;

    fn measure(units: f64, seconds: f64, cpu: f64) -> Option<Measure> {
        Some(Measure { units, seconds, cpu })
    }

    fn line(name: &str) -> Line {
        let row = ROWS.iter().find(|row| row.name == name).expect("a row");
        Line { row, native: None, kvasir: None, tcg: vec![None, None] }
    }

    #[test]
    fn the_better_tcg_counts() {
        let mut sieve = line("sieve");
        sieve.kvasir = measure(100.0, 2.0, 1.0);
        sieve.tcg = vec![measure(20.0, 1.0, 1.0), measure(40.0, 1.0, 1.0)];
        assert_eq!(sieve.ratio(Clock::Cpu), Some(2.5));
        assert_eq!((sieve.met(Clock::Cpu), sieve.met(Clock::Wall)), (Some(true), Some(false)));
        let mut boot = line("boot");
        boot.kvasir = measure(1.0, 1.0, 0.5);
        boot.tcg = vec![measure(1.0, 3.0, 2.0), None];
        assert_eq!((boot.ratio(Clock::Cpu), boot.ratio(Clock::Wall)), (Some(4.0), Some(3.0)));
        let mut idle = line("idle");
        idle.kvasir = measure(1.5, 5.0, 0.1);
        assert_eq!(idle.met(Clock::Cpu), Some(false));
    }

    #[test]
    fn table_and_chart_show_the_rows() {
        let mut sieve = line("sieve");
        (sieve.native, sieve.kvasir) = (measure(4e8, 1.0, 1.0), measure(1e8, 1.0, 1.0));
        sieve.tcg = vec![measure(2e7, 1.0, 1.0), None];
        let text = table(&[sieve], &["7.2".into(), "10.0".into()], Clock::Cpu);
        assert!(text.contains("| 400 Mnumber/s |") || text.contains("| 400 M number/s |"), "{text}");
        assert!(text.contains("| 1/4.0 | 5.00 | 2.5 | yes |"), "{text}");
        let mut sieve = line("sieve");
        (sieve.native, sieve.kvasir) = (measure(4e8, 1.0, 1.0), measure(1e8, 1.0, 1.0));
        sieve.tcg = vec![measure(2e7, 1.0, 1.0)];
        let svg = chart(&[sieve], Clock::Cpu);
        assert!(
            svg.starts_with("<svg") && svg.contains("5.0×") && svg.trim_end().ends_with("</svg>"),
            "{svg}"
        );
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(scaled(0.123), "0.12");
        assert_eq!(scaled(1234.0), "1.23 k");
        assert_eq!(scaled(45_600_000.0), "45.6 M");
        assert_eq!(scaled(999_900.0), "1.00 M");
    }
}
