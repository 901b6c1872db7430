//! Running other programs.

use crate::{Error, Result};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether we may do what root may.
pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A program on this host.
pub(super) struct Program(PathBuf);

impl Program {
    /// Looks in the `PATH`, and where administrators' programs are.
    pub(super) fn find(program: &'static str, why: &'static str, package: &'static str) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
        places.map(|dir| dir.join(program)).find(|p| p.is_file()).map(Self).ok_or(Error::Missing {
            program,
            why,
            package,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn command(&self) -> Command {
        Command::new(&self.0)
    }
}

/// Runs a command and gives each line of its messages to `each`.
///
/// In its own process group: an interrupt from the keyboard is for us, who then end it in order.
pub(super) fn run(mut command: Command, mut each: impl FnMut(&str)) -> Result<()> {
    const KEPT: usize = 4;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(Error::io(&program))?;
    let mut last: Vec<String> = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line);
            tracing::debug!("{program}: {line}");
            each(&line);
            if line.starts_with("E:") || line.to_lowercase().contains("error") {
                last.push(line.trim().to_owned());
                if last.len() > KEPT {
                    last.remove(0);
                }
            }
        }
    }
    let status = child.wait().map_err(Error::io(&program))?;
    if status.success() {
        return Ok(());
    }
    let last = if last.is_empty() { "no message".into() } else { last.join("; ") };
    Err(Error::Failed { program, status: status.to_string(), last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_kept() {
        let mut lines = 0;
        let mut command = Command::new("sh");
        command.args(["-c", "echo I: x >&2; echo E: no such package >&2; exit 3"]);
        let error = run(command, |_| lines += 1).unwrap_err().to_string();
        assert_eq!(lines, 2);
        assert!(error.contains("E: no such package") && error.contains('3'), "{error}");
        assert!(
            Program::find("no-such-program", "to test", "a-package")
                .is_err_and(|e| e.to_string().contains("a-package"))
        );
    }
}
