//! What the checks found, for people and for programs.

use std::fmt;

use serde::Serialize;

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, but less well than it could.
    Warning,
    /// Not there: what needs it cannot be used.
    Missing,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        }
    }
}

/// The outcome of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name, the same in every report.
    pub check: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found, in one line.
    pub found: String,
    /// What to do about it, in one line; nothing to do where it is `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, status: Status::Ok, found: found.into(), remedy: None }
    }

    /// It works less well than it could; `remedy` says how to get there.
    pub(crate) fn warning(
        check: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding { check, status: Status::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// It is not there; `remedy` says how to get it.
    pub(crate) fn missing(
        check: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding { check, status: Status::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Everything found on one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of the checks.
    pub findings: Vec<Finding>,
}

impl Report {
    /// How many findings have this status.
    #[must_use]
    pub fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }
}

impl fmt::Display for Report {
    /// One line for each finding, its remedy below it, and the sums at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
        for finding in &self.findings {
            writeln!(f, "{:<7}  {:<width$}  {}", finding.status.word(), finding.check, finding.found)?;
            if let Some(remedy) = &finding.remedy {
                writeln!(f, "{:<7}  {:<width$}  -> {remedy}", "", "")?;
            }
        }
        let [ok, warnings, missing] =
            [Status::Ok, Status::Warning, Status::Missing].map(|status| self.count(status));
        writeln!(f, "{ok} ok, {warnings} warnings, {missing} missing")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let findings =
            vec![Finding::ok("kernel", "Linux 6.1"), Finding::missing("ovmf", "no OVMF", "install ovmf")];
        Report { findings }
    }

    #[test]
    fn text_has_a_line_each_and_the_remedies() {
        let text = sample().to_string();
        let expected = "\
ok       kernel  Linux 6.1\n\
missing  ovmf    no OVMF\n                 -> install ovmf\n\
1 ok, 0 warnings, 1 missing\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_names_are_stable() {
        let json = serde_json::to_value(sample()).expect("serializes");
        assert_eq!(
            json["findings"][0],
            serde_json::json!({"check": "kernel", "status": "ok", "found": "Linux 6.1"})
        );
        assert_eq!(json["findings"][1]["status"], "missing");
        assert_eq!(json["findings"][1]["remedy"], "install ovmf");
    }
}
