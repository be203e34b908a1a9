//! The fields in which the states of two devices differ.

use qemu_stream::state::{DeviceState, Field, Fields, Value};
use serde::Serialize;

use crate::verbs::inspect::device::{name_of, scalar};

/// A field that differs, with both values as text.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct FieldDifference {
    pub(super) path: String,
    pub(super) a: String,
    pub(super) b: String,
}

impl FieldDifference {
    /// Bytes that differ: how many, and the first of them.
    pub(super) fn of_bytes(path: &str, a: &[u8], b: &[u8]) -> Self {
        let first = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
        let shown = |bytes: &[u8]| {
            let rest = bytes.get(first..).unwrap_or_default();
            let rest = rest.get(..SHOWN).unwrap_or(rest);
            format!("{} bytes, at {first:#x}: {}", bytes.len(), scalar(&Value::Bytes(rest)))
        };
        Self { path: path.to_owned(), a: shown(a), b: shown(b) }
    }
}

/// All fields that differ.
pub(super) fn differences(a: &DeviceState<'_>, b: &DeviceState<'_>) -> Vec<FieldDifference> {
    let mut found = Vec::new();
    // Most devices are equal.
    if a.bytes() != b.bytes() || a.version() != b.version() {
        compare_all("", a.fields(), b.fields(), &mut found);
    }
    found
}

fn compare_all(path: &str, a: Fields<'_>, b: Fields<'_>, found: &mut Vec<FieldDifference>) {
    let (mut a, mut b) = (a, b);
    while found.len() < MOST {
        let (one, other) = match (a.next(), b.next()) {
            (Some(one), Some(other)) => (one, other),
            (None, None) => return,
            (one, other) => {
                let length = |field: Option<Field<'_>>| {
                    field.map_or_else(|| "none".to_owned(), |field| format!("{} bytes", field.bytes().len()))
                };
                let path = one.or(other).map(|field| joined(path, &field)).unwrap_or_default();
                found.push(FieldDifference { path, a: length(one), b: length(other) });
                continue;
            }
        };
        // Optional fields and subsections may be missing on one side; all that follows is then shifted.
        if one.name() != other.name() || one.kind() != other.kind() {
            found.push(FieldDifference { path: path.to_owned(), a: joined("", &one), b: joined("", &other) });
            return;
        }
        if one.bytes() != other.bytes() {
            compare(&joined(path, &one), &one.value(), &other.value(), found);
        }
    }
}

fn compare(path: &str, a: &Value<'_>, b: &Value<'_>, found: &mut Vec<FieldDifference>) {
    match (a, b) {
        (Value::Struct(a), Value::Struct(b)) => compare_all(path, *a, *b, found),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (number, (one, other)) in a.iter().zip(b.iter()).enumerate() {
                if found.len() >= MOST {
                    return;
                }
                compare(&format!("{path}[{number}]"), &one, &other, found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            let shown = |length: usize| format!("{length} elements");
            found.push(FieldDifference { path: path.to_owned(), a: shown(a.len()), b: shown(b.len()) });
        }
        (Value::Bytes(a), Value::Bytes(b)) if a != b && a.len().max(b.len()) > SHOWN => {
            found.push(FieldDifference::of_bytes(path, a, b));
        }
        (a, b) => {
            let (a, b) = (scalar(a), scalar(b));
            if a != b {
                found.push(FieldDifference { path: path.to_owned(), a, b });
            }
        }
    }
}

fn joined(path: &str, field: &Field<'_>) -> String {
    if path.is_empty() { name_of(field) } else { format!("{path}.{}", name_of(field)) }
}

/// Bytes of a value that are shown.
const SHOWN: usize = 16;
/// Differences of one device; more are not collected.
const MOST: usize = 10_000;
