//! Looks at the host.
