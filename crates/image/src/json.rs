//! JSON laid out as QEMU lays it out: four spaces, and keys in the order of its dictionaries.

use serde_json::{Map, Value};

/// Where QEMU's dictionaries keep a key: the hash of Trivial Database, over 512 buckets. Programs that compare its output
/// as text see the same order here.
fn bucket(key: &str) -> u32 {
    let mut hash = 0x238f_13afu32.wrapping_mul(key.len() as u32);
    for (i, byte) in key.bytes().enumerate() {
        hash = hash.wrapping_add(u32::from(byte) << (i * 5 % 24));
    }
    hash.wrapping_mul(1_103_515_243).wrapping_add(12_345) % 512
}

/// Members in QEMU's order.
pub(crate) fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = map.iter().collect();
    // Within a bucket the key put in last comes first; for the keys used here that is the later in the alphabet.
    members.reverse();
    members.sort_by_key(|(key, _)| bucket(key));
    members
}

/// The text of a value.
pub(crate) fn pretty(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let indent = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', depth * 4));
    };
    match value {
        Value::Object(map) => {
            out.push('{');
            for (i, (key, member)) in ordered(map).into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                indent(out, depth + 1);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                write(member, depth + 1, out);
            }
            indent(out, depth);
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                indent(out, depth + 1);
                write(item, depth + 1, out);
            }
            indent(out, depth);
            out.push(']');
        }
        other => out.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_in_qemus_order() {
        let value = serde_json::json!({
            "filename": "a", "virtual-size": 1, "children": [], "dirty-flag": false, "format": "raw", "actual-size": 2,
            "format-specific": {}
        });
        let keys: Vec<&str> =
            ordered(value.as_object().unwrap()).into_iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(
            keys,
            [
                "children",
                "virtual-size",
                "filename",
                "format",
                "actual-size",
                "format-specific",
                "dirty-flag"
            ]
        );
        assert_eq!(pretty(&serde_json::json!({"a": [1]})), "{\n    \"a\": [\n        1\n    ]\n}");
    }
}
