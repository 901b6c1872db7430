//! The seed of a guest's first boot: a small FAT file system labelled `CIDATA` with the files that cloud-init's
//! NoCloud source reads (`meta-data`, `user-data`), and `kvasir.env` for guests that [`crate::debian`] built, which have
//! a shell script instead of cloud-init.

use crate::{Error, Result};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Size of the seed image in bytes.
const SIZE: u64 = 1 << 20;
/// Longest user-data that fits.
const USER_DATA_MAX: usize = 512 << 10;

/// What a guest is told on its first boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// Identifies this guest: a new one makes the guest run its first boot again.
    pub instance_id: String,
    /// Host name.
    pub hostname: String,
    /// User to create, with the right to become root by sudo.
    pub user: String,
    /// The user's password in plain text; none leaves only the keys.
    pub password: Option<String>,
    /// Public SSH keys of the user, a line each.
    pub ssh_keys: Vec<String>,
    /// cloud-init user data instead of what follows from the above.
    pub user_data: Option<Vec<u8>>,
}

/// Host names (RFC 1123, 2.1): letters, digits and hyphens, labels of at most 63 characters.
///
/// # Errors
/// Says what a host name may be.
pub fn check_hostname(name: &str) -> Result<()> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "'{name}' is not a host name: use letters, digits and hyphens, at most 63 of them between dots"
    )))
}

/// User names as Debian's `adduser` takes them.
///
/// # Errors
/// Says what a user name may be.
pub fn check_user(name: &str) -> Result<()> {
    let mut chars = name.chars();
    let good = chars.next().is_some_and(|c| c.is_ascii_lowercase())
        && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_'))
        && name.len() <= 32
        && name != "root";
    if good {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "'{name}' cannot be the guest's user: use up to 32 lower-case letters, digits, '-' and '_', a letter first, and not root"
    )))
}

/// A public key as in `authorized_keys`: type, base64, perhaps a comment.
///
/// # Errors
/// The text is none, for example because it is a private key.
pub fn check_key(text: &str) -> Result<()> {
    let mut words = text.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let body = words.next().unwrap_or_default();
    let base64 = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
    let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|p| kind.starts_with(p));
    if known && body.len() > 16 && body.bytes().all(base64) && !text.chars().any(char::is_control) {
        return Ok(());
    }
    let start: String = text.chars().take(24).collect();
    Err(Error::Usage(format!(
        "'{start}...' is not a public SSH key: give the line, or the file, that ends in .pub"
    )))
}

/// A word in single quotes, as a POSIX shell reads it (2.2.2).
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A YAML double-quoted scalar (YAML 1.2.2, 7.3.1).
fn yaml(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c) & 0xff); // writing to a String cannot fail
            }
            c => out.push(c),
        }
    }
    out + "\""
}

impl Seed {
    /// Checks everything that ends up in the guest.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        check_hostname(&self.hostname)?;
        check_user(&self.user)?;
        self.ssh_keys.iter().try_for_each(|k| check_key(k))?;
        if self.password.as_ref().is_some_and(|p| p.is_empty() || p.chars().any(char::is_control)) {
            return Err(Error::Usage("the password must be one line, and not empty".into()));
        }
        if self.user_data.as_ref().is_some_and(|d| d.len() > USER_DATA_MAX) {
            return Err(Error::Usage(format!("the user data is longer than {} KiB", USER_DATA_MAX >> 10)));
        }
        Ok(())
    }

    fn meta_data(&self) -> String {
        format!("instance-id: {}\nlocal-hostname: {}\n", yaml(&self.instance_id), yaml(&self.hostname))
    }

    fn cloud_config(&self) -> String {
        let mut out = format!("#cloud-config\nhostname: {}\nusers:\n", yaml(&self.hostname));
        out += &format!("  - name: {}\n    groups: [sudo]\n    shell: /bin/bash\n", yaml(&self.user));
        out += "    sudo: \"ALL=(ALL) NOPASSWD:ALL\"\n";
        if let Some(password) = &self.password {
            out += &format!("    lock_passwd: false\n    plain_text_passwd: {}\n", yaml(password));
        }
        if !self.ssh_keys.is_empty() {
            out += "    ssh_authorized_keys:\n";
            for key in &self.ssh_keys {
                out += &format!("      - {}\n", yaml(key.trim()));
            }
        }
        out += "growpart:\n  mode: auto\n  devices: [/]\n";
        out
    }

    fn environment(&self) -> String {
        let keys: Vec<_> = self.ssh_keys.iter().map(|k| k.trim()).collect();
        format!(
            "KVASIR_INSTANCE={}\nKVASIR_HOSTNAME={}\nKVASIR_USER={}\nKVASIR_PASSWORD={}\nKVASIR_SSH_KEYS={}\n",
            quote(&self.instance_id),
            quote(&self.hostname),
            quote(&self.user),
            quote(self.password.as_deref().unwrap_or_default()),
            quote(&keys.join("\n")),
        )
    }

    /// Writes the seed as a disk image that only its owner can read (it may hold a password).
    ///
    /// # Errors
    /// Something in it is wrong, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check()?;
        let mut image = io_cursor();
        self.fill(&mut image).map_err(Error::io(path))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(Error::io(path))?;
        file.write_all(image.get_ref()).map_err(Error::io(path))
    }

    fn fill(&self, image: &mut std::io::Cursor<Vec<u8>>) -> std::io::Result<()> {
        let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
        fatfs::format_volume(&mut *image, options)?;
        let fs = fatfs::FileSystem::new(&mut *image, fatfs::FsOptions::new())?;
        let cloud_config = self.cloud_config().into_bytes();
        let (meta_data, environment) = (self.meta_data(), self.environment());
        let files: [(&str, &[u8]); 3] = [
            ("meta-data", meta_data.as_bytes()),
            ("user-data", self.user_data.as_deref().unwrap_or(&cloud_config)),
            ("kvasir.env", environment.as_bytes()),
        ];
        for (name, data) in files {
            fs.root_dir().create_file(name)?.write_all(data)?;
        }
        fs.unmount()
    }
}

fn io_cursor() -> std::io::Cursor<Vec<u8>> {
    std::io::Cursor::new(vec![0; SIZE as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIf3j4Wx0+4n8Wb0Jm2oC3t5YqzZ me@here";

    fn seed() -> Seed {
        Seed {
            instance_id: "i-1".into(),
            hostname: "web-1".into(),
            user: "ann".into(),
            password: Some("it's \"x\" \\ $HOME".into()),
            ssh_keys: vec![KEY.into(), KEY.into()],
            user_data: None,
        }
    }

    fn read(path: &Path, name: &str) -> Vec<u8> {
        let fs = fatfs::FileSystem::new(std::fs::File::open(path).unwrap(), fatfs::FsOptions::new()).unwrap();
        assert_eq!(fs.volume_label().trim(), "CIDATA");
        let mut out = Vec::new();
        fs.root_dir().open_file(name).unwrap().read_to_end(&mut out).unwrap();
        out
    }

    #[test]
    fn the_seed_holds_what_both_kinds_of_guest_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        seed().write(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let meta = String::from_utf8(read(&path, "meta-data")).unwrap();
        assert_eq!(meta, "instance-id: \"i-1\"\nlocal-hostname: \"web-1\"\n");
        let user = String::from_utf8(read(&path, "user-data")).unwrap();
        assert!(
            user.starts_with("#cloud-config\n") && user.contains(&format!("      - \"{KEY}\"\n")),
            "{user}"
        );
        assert!(user.contains(r#"plain_text_passwd: "it's \"x\" \\ $HOME""#), "{user}");

        let own = Seed { user_data: Some(b"#!/bin/sh\necho hi\n".to_vec()), ..seed() };
        own.write(&path).unwrap();
        assert_eq!(read(&path, "user-data"), b"#!/bin/sh\necho hi\n");
    }

    #[test]
    fn a_shell_reads_back_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        seed().write(&path).unwrap();
        let env = dir.path().join("env");
        std::fs::write(&env, read(&path, "kvasir.env")).unwrap();
        let script = ". \"$1\"; printf '%s|' \"$KVASIR_HOSTNAME\" \"$KVASIR_USER\" \"$KVASIR_PASSWORD\" \"$KVASIR_SSH_KEYS\"";
        let out = std::process::Command::new("sh").args(["-c", script, "sh"]).arg(&env).output().unwrap();
        let expected = format!("web-1|ann|it's \"x\" \\ $HOME|{KEY}\n{KEY}|");
        assert_eq!(String::from_utf8(out.stdout).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_is_refused_before_a_file_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let bad = [
            (Seed { hostname: "a_b".into(), ..seed() }, "host name"),
            (Seed { hostname: "-a".into(), ..seed() }, "host name"),
            (Seed { hostname: String::new(), ..seed() }, "host name"),
            (Seed { user: "root".into(), ..seed() }, "not root"),
            (Seed { user: "Ann;x".into(), ..seed() }, "user"),
            (Seed { ssh_keys: vec!["-----BEGIN OPENSSH PRIVATE KEY-----".into()], ..seed() }, ".pub"),
            (Seed { ssh_keys: vec![format!("{KEY}\n- x")], ..seed() }, ".pub"),
            (Seed { password: Some("a\nb".into()), ..seed() }, "password"),
            (Seed { user_data: Some(vec![b'#'; USER_DATA_MAX + 1]), ..seed() }, "user data"),
        ];
        for (seed, expected) in bad {
            let error = seed.write(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!path.exists());
        }
    }
}
