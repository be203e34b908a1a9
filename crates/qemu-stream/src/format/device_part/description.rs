//! The closing JSON, reduced to the names and lengths that split the device part.
//!
//! Lengths are summed while parsing and the fields are not kept, so a hostile description uses no more memory than its
//! devices' names. The JSON parser bounds the nesting.

use std::fmt;

use multifd::ram::BlockName;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::json;

use super::Device;
use crate::{
    error::Usage,
    format::{SectionName, limits},
};

/// The bytes of a subsection before its fields, without its name: type, length of the name, version.
const SUBSECTION_HEAD: u64 = 6;

/// The closing description: the devices and the lengths of their bodies.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Description {
    /// The target page size.
    pub page_size: Option<u64>,
    #[serde(deserialize_with = "bounded")]
    pub(super) devices: Vec<Entry>,
    /// Present if the source has not sent it.
    #[serde(default, deserialize_with = "present")]
    split: bool,
}

/// One device as described.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Described")]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) instance: i64,
    /// The length of the body in bytes; `None` if the sum exceeds 64 bits.
    pub(super) length: Option<u64>,
}

impl Description {
    /// Parses the JSON.
    ///
    /// # Errors
    /// If it is not JSON or not of the expected shape.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// Whether it was [derived](derive) from the sections themselves.
    pub(super) fn is_derived(&self) -> bool {
        self.split
    }
}

#[derive(Deserialize)]
struct Described {
    name: String,
    #[serde(default)]
    instance_id: i64,
    #[serde(default)]
    fields: Sum<Field>,
    #[serde(default)]
    subsections: Sum<Subsection>,
}

impl From<Described> for Entry {
    fn from(device: Described) -> Self {
        let Described { name, instance_id, fields, subsections } = device;
        Self { name, instance: instance_id, length: add(fields.total, subsections.total) }
    }
}

/// A field. If it is a struct, its size includes everything nested in it and its subsections.
#[derive(Deserialize)]
struct Field {
    size: u64,
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Sum<Field>,
    #[serde(default)]
    subsections: Sum<Self>,
}

trait Length {
    fn length(&self) -> Option<u64>;
}

impl Length for Field {
    fn length(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Length for Subsection {
    fn length(&self) -> Option<u64> {
        let head = SUBSECTION_HEAD + self.vmsd_name.len() as u64;
        add(Some(head), add(self.fields.total, self.subsections.total))
    }
}

/// The sum of the lengths of an array's elements, computed while parsing; `None` beyond 64 bits.
struct Sum<T> {
    total: Option<u64>,
    element: std::marker::PhantomData<T>,
}

impl<T> Default for Sum<T> {
    fn default() -> Self {
        Self { total: Some(0), element: std::marker::PhantomData }
    }
}

impl<'de, T: Length + Deserialize<'de>> Deserialize<'de> for Sum<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Adder<T>(Sum<T>);

        impl<'de, T: Length + Deserialize<'de>> Visitor<'de> for Adder<T> {
            type Value = Sum<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of fields or subsections")
            }

            fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Sum<T>, A::Error> {
                while let Some(element) = seq.next_element::<T>()? {
                    self.0.total = add(self.0.total, element.length());
                }
                Ok(self.0)
            }
        }

        deserializer.deserialize_seq(Adder(Self::default()))
    }
}

fn add(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    a?.checked_add(b?)
}

fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Entry>, D::Error> {
    struct Entries;

    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<Entry>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of devices")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Entry>, A::Error> {
            let mut entries = Vec::new();
            while entries.len() < limits::DEVICES {
                let Some(entry) = seq.next_element()? else { return Ok(entries) };
                entries.push(entry);
            }
            match seq.next_element::<IgnoredAny>()? {
                None => Ok(entries),
                Some(_) => Err(A::Error::custom(format_args!("more than {} devices", limits::DEVICES))),
            }
        }
    }

    deserializer.deserialize_seq(Entries)
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// The description of an embedder's devices, each with one field that contains its state.
pub(super) fn describe(devices: &[Device], page_size: u32) -> Result<Vec<u8>, Usage> {
    let described: Result<Vec<_>, Usage> = devices.iter().map(describe_one).collect();
    Ok(json!({ "page_size": page_size, "devices": described? }).to_string().into_bytes())
}

/// The description of sections that arrived without one, in the order of the stream: their names, instances, versions and
/// lengths. `None` if a name is not ASCII. The key `split` shows that the source has not sent it.
pub(super) fn derive<'s>(
    sections: impl Iterator<Item = (&'s SectionName, u32, u32, usize)>,
    page_size: usize,
) -> Option<Vec<u8>> {
    let described = sections.map(|(name, instance, version, size)| {
        let name = BlockName::to_str(name.as_name()).ok().filter(|text| text.is_ascii())?;
        Some(json!({
            "name": name,
            "instance_id": instance,
            "version": version,
            "size": size,
            "fields": [{ "name": "data", "size": size, "type": "buffer" }],
        }))
    });
    let described: Vec<_> = described.collect::<Option<_>>()?;
    let json = json!({ "page_size": page_size, "split": "at footers", "devices": described });
    Some(json.to_string().into_bytes())
}

fn describe_one(device: &Device) -> Result<serde_json::Value, Usage> {
    let name = device.name.as_name();
    let text = BlockName::to_str(name).ok().filter(|text| text.is_ascii());
    let text = text.ok_or_else(|| not_ascii(&device.name))?;
    let size = device.state.len();
    Ok(json!({
        "name": text,
        "instance_id": device.instance,
        "size": size,
        "fields": [{ "name": "data", "size": size, "type": "buffer" }],
    }))
}

fn not_ascii(name: &SectionName) -> Usage {
    Usage::Value { what: "device name", why: format!("expected ascii, found \"{name}\"") }
}
