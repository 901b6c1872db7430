//! `--object`: secrets and other things that images refer to by name.

use block::{Error, Options, Result, nbd::TlsCredentials, secret};
use std::{collections::BTreeMap, sync::Arc};

/// What the `--object` arguments define.
#[derive(Clone, Debug, Default)]
pub(crate) struct Objects {
    /// Secrets by id.
    pub(crate) secrets: Arc<BTreeMap<String, Vec<u8>>>,
    /// TLS credentials by id.
    pub(crate) credentials: Arc<BTreeMap<String, TlsCredentials>>,
}

/// Takes `secret,id=x,data=y`, `qom-type=secret,id=...` or a JSON object apart: kind and properties.
fn split(text: &str) -> Result<(String, Options)> {
    let mut options = if text.trim_start().starts_with('{') {
        let flat = block::storage::parse_json_name(&format!("json:{text}"));
        Options::from(flat.unwrap_or_else(|| Err(Error::usage("Invalid JSON object given")))?)
    } else {
        let (first, rest) = text.split_once(',').unwrap_or((text, ""));
        if first.contains('=') {
            Options::parse(text)?
        } else {
            let mut options = Options::parse(rest)?;
            options.set("qom-type", first);
            options
        }
    };
    let kind = options.take("qom-type").ok_or_else(|| Error::usage("Parameter 'qom-type' is missing"))?;
    Ok((kind, options))
}

/// Reads the arguments in order; a secret may refer to one before it.
pub(crate) fn parse(arguments: &[String]) -> Result<Objects> {
    let mut secrets = BTreeMap::new();
    let mut credentials = BTreeMap::new();
    for text in arguments {
        let (kind, mut options) = split(text)?;
        let id = options.take("id").ok_or_else(|| Error::usage("Parameter 'id' is missing"))?;
        if secrets.contains_key(&id) || credentials.contains_key(&id) {
            return Err(Error::usage(format!("attempt to add duplicate property '{id}' to object")));
        }
        match kind.as_str() {
            "secret" => {
                let value = secret::load(&mut options, &secrets)?;
                secrets.insert(id, value);
            }
            "tls-creds-x509" => {
                credentials.insert(id, TlsCredentials::take(&mut options)?);
            }
            "tls-creds-psk" | "tls-creds-anon" => {
                return Err(Error::unsupported(format!(
                    "'{kind}': only certificates are supported for TLS; use tls-creds-x509"
                )));
            }
            other => {
                return Err(Error::usage(format!(
                    "Invalid parameter '{other}': images use objects of the types secret and tls-creds-x509"
                )));
            }
        }
        options.finish(&format!("object '{kind}'"))?;
    }
    Ok(Objects { secrets: Arc::new(secrets), credentials: Arc::new(credentials) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_every_spelling() {
        let objects = parse(&[
            "secret,id=a,data=x,,y".into(),
            "qom-type=secret,id=b,data=c2VzYW1l,format=base64".into(),
            r#"{"qom-type": "secret", "id": "c", "data": "z"}"#.into(),
        ])
        .unwrap();
        assert_eq!(objects.secrets["a"], b"x,y");
        assert_eq!(objects.secrets["b"], b"sesame");
        assert_eq!(objects.secrets["c"], b"z");
        for bad in [
            "secret,data=x",
            "secret,id=a",
            "rng,id=a",
            "secret,id=a,data=x,odd=1",
            "secret,id=a,data=x,file=y",
        ] {
            assert!(parse(&[bad.into()]).is_err(), "{bad}");
        }
    }
}
