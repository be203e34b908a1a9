//! The closing description, with the names and types of fields.
//!
//! The sizes are untrusted: [`Described::check`] compares every one with the sum of its parts, so that a view of a field never
//! leaves its section. The JSON parser bounds the nesting.

use serde::Deserialize;

/// The bytes of a subsection before its fields, without its name: type, length of the name, version.
const SUBSECTION_HEAD: u64 = 6;

#[derive(Deserialize)]
struct Description {
    devices: Vec<Described>,
}

/// One device.
#[derive(Debug, Deserialize)]
pub(super) struct Described {
    pub(super) name: String,
    #[serde(default)]
    pub(super) instance_id: i64,
    #[serde(default)]
    pub(super) fields: Vec<FieldOf>,
    #[serde(default)]
    pub(super) subsections: Vec<Group>,
}

/// A field. `size` is that of one element if it is an array, and includes all that is nested in it.
#[derive(Debug, Deserialize)]
pub(super) struct FieldOf {
    pub(super) name: String,
    #[serde(rename = "type", default)]
    pub(super) kind: String,
    pub(super) size: u64,
    pub(super) array_len: Option<u64>,
    pub(super) index: Option<u64>,
    #[serde(rename = "struct")]
    pub(super) group: Option<Box<Group>>,
}

/// The fields of a struct or of a subsection.
#[derive(Debug, Deserialize)]
pub(super) struct Group {
    #[serde(default)]
    pub(super) vmsd_name: String,
    #[serde(default)]
    pub(super) fields: Vec<FieldOf>,
    #[serde(default)]
    pub(super) subsections: Vec<Self>,
}

pub(super) fn parse(json: &[u8]) -> Result<Vec<Described>, serde_json::Error> {
    Ok(serde_json::from_slice::<Description>(json)?.devices)
}

impl Described {
    /// Checks that its parts cover `length` bytes exactly. The error is the name of a part that does not.
    pub(super) fn check(&self, length: u64) -> Result<(), String> {
        let found = sum(&self.fields, &self.subsections)?;
        if found == Some(length) { Ok(()) } else { Err(self.name.clone()) }
    }
}

impl FieldOf {
    /// The bytes of all its elements; `None` beyond 64 bits.
    pub(super) fn length(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Group {
    /// The bytes of a subsection before its fields.
    pub(super) fn head(&self) -> u64 {
        SUBSECTION_HEAD + self.vmsd_name.len() as u64
    }
}

/// The bytes of these parts, each of which was checked; `None` beyond 64 bits.
fn sum(fields: &[FieldOf], subsections: &[Group]) -> Result<Option<u64>, String> {
    let mut total = Some(0_u64);
    let mut add = |more: Option<u64>| total = total.and_then(|total| total.checked_add(more?));
    for field in fields {
        if let Some(group) = &field.group
            && sum(&group.fields, &group.subsections)? != Some(field.size)
        {
            return Err(field.name.clone());
        }
        add(field.length());
    }
    for subsection in subsections {
        add(Some(subsection.head()));
        add(sum(&subsection.fields, &subsection.subsections)?);
    }
    Ok(total)
}
