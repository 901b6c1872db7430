//! Looks at the host and says what it has, what it lacks for running virtual machines, and what to do about it.
//!
//! [`doctor`] makes every check of one table ([`checks`]) on this machine. A check reads files below a root directory
//! and nothing else, so tests hand it a made-up machine.

mod checks;
mod host;
mod report;

pub use host::Host;
pub use report::{Finding, Report, Status};

/// Examines this machine.
#[must_use]
pub fn doctor() -> Report {
    examine(&Host::here())
}

/// Examines a machine whose `/proc`, `/sys`, `/dev` and `/usr` are given.
#[must_use]
pub fn examine(host: &Host) -> Report {
    Report { findings: checks::ALL.iter().map(|check| check(host)).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_machine_gets_a_full_report() {
        let directory = tempfile::tempdir().expect("directory");
        let report = examine(&Host::below(directory.path()));
        assert_eq!(report.findings.len(), checks::ALL.len());
        let mut names: Vec<_> = report.findings.iter().map(|finding| finding.check).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks::ALL.len(), "a check is named twice");
        for finding in &report.findings {
            assert!(finding.status == Status::Ok || finding.remedy.is_some(), "{}: no remedy", finding.check);
        }
    }

    #[test]
    fn this_machine_can_be_examined() {
        assert!(
            doctor().findings.iter().any(|finding| finding.check == "kernel" && finding.status == Status::Ok)
        );
    }
}
