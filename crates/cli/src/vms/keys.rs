//! SSH keys for a guest: the user's own, or a pair made for the VM.

use crate::Failure;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Keys that get into the guest, and the private one if it was made here.
pub(super) struct Keys {
    pub(super) public: Vec<String>,
    pub(super) private: Option<PathBuf>,
}

/// The text of `--ssh-key`: a key, or a file of them.
pub(super) fn given(text: &str) -> Result<Vec<String>, Failure> {
    if guest::seed::check_key(text).is_ok() {
        return Ok(vec![text.into()]);
    }
    let content =
        std::fs::read_to_string(text).map_err(|e| Failure::usage(format!("--ssh-key {text}: {e}")))?;
    let keys: Vec<String> = content
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(Into::into)
        .collect();
    for key in &keys {
        guest::seed::check_key(key).map_err(|e| Failure::usage(format!("--ssh-key {text}: {e}")))?;
    }
    if keys.is_empty() {
        return Err(Failure::usage(format!("--ssh-key {text}: there is no key in it")));
    }
    Ok(keys)
}

/// The keys of `--ssh-key`; without any, a pair is made in `dir`, so that logging in always works.
pub(super) fn choose(texts: &[String], dir: &Path) -> Result<Keys, Failure> {
    let mut public = Vec::new();
    for text in texts {
        public.extend(given(text)?);
    }
    if !public.is_empty() {
        return Ok(Keys { public, private: None });
    }
    let private = PathBuf::from("id_ed25519");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-N", "", "-C", "kvasir", "-t", "ed25519", "-f"])
        .arg(dir.join(&private))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    match made {
        Ok(status) if status.success() => {
            let path = dir.join("id_ed25519.pub");
            let key = std::fs::read_to_string(&path)
                .map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            Ok(Keys { public: vec![key.trim().into()], private: Some(private) })
        }
        Ok(status) => Err(Failure::usage(format!("ssh-keygen: {status}"))),
        Err(e) => Err(Failure::usage(format!(
            "no --ssh-key is given, and a pair cannot be made: ssh-keygen: {e}; install the package 'openssh-client'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_as_text_or_in_a_file() {
        const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIf3j4Wx0 me";
        assert_eq!(given(KEY).ok().unwrap(), [KEY]);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, format!("# mine\n{KEY}\n\n{KEY}\n")).unwrap();
        assert_eq!(given(file.to_str().unwrap()).ok().unwrap(), [KEY, KEY]);
        std::fs::write(&file, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        assert!(given(file.to_str().unwrap()).is_err_and(|f| f.message.contains(".pub")));
        std::fs::write(&file, "\n").unwrap();
        assert!(given(file.to_str().unwrap()).is_err_and(|f| f.message.contains("no key")));
        assert!(given("/nowhere/key.pub").is_err_and(|f| f.message.contains("/nowhere")));
    }
}
