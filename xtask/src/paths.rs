//! Where things are: the source tree and the cache directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// The root of the source tree this program was built from.
pub fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// The cache directory: `$KVASIR_CACHE`, else `$XDG_CACHE_HOME/kvasir`, else `~/.cache/kvasir`.
pub fn cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = if let Some(path) = set("KVASIR_CACHE") {
        path
    } else if let Some(path) = set("XDG_CACHE_HOME") {
        path.join("kvasir")
    } else if let Some(home) = set("HOME") {
        home.join(".cache/kvasir")
    } else {
        bail!("no cache directory: set KVASIR_CACHE, XDG_CACHE_HOME or HOME");
    };
    std::fs::create_dir_all(&path).with_context(|| {
        format!("{}: cannot create the cache directory; set KVASIR_CACHE", path.display())
    })?;
    path.canonicalize().with_context(|| path.display().to_string())
}

/// A lock on the cache directory, held until dropped, so that two tasks do not prepare the same thing at once.
pub struct CacheLock(#[expect(dead_code, reason = "closing the file releases the lock")] std::fs::File);

/// Waits for, and takes, the lock on the cache directory.
pub fn lock_cache() -> Result<CacheLock> {
    let path = cache()?.join("lock");
    let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    flock(&file, FlockOperation::LockExclusive)
        .with_context(|| format!("{}: cannot lock", path.display()))?;
    Ok(CacheLock(file))
}

/// Writes a file through a temporary name beside it, so that readers see the old or the new contents, never half.
pub fn write_atomically(path: &Path, data: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    std::fs::write(&temporary, data).with_context(|| temporary.display().to_string())?;
    std::fs::rename(&temporary, path).with_context(|| path.display().to_string())
}
