//! Views of fields: what is asked for is decoded.

use super::described::{FieldOf, Group};

/// The fields of a device, a struct or a subsection, in the order of the stream.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    fields: &'a [FieldOf],
    subsections: &'a [Group],
    bytes: &'a [u8],
}

/// A field, or a subsection.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    of: Part<'a>,
    bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
enum Part<'a> {
    Field(&'a FieldOf),
    Subsection(&'a Group),
}

/// What a field contains.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Value<'a> {
    /// A number without a sign.
    Unsigned(u64),
    /// A number with a sign.
    Signed(i64),
    /// True or false.
    Bool(bool),
    /// Something else, as in the stream.
    Bytes(&'a [u8]),
    /// A struct, or a subsection.
    Struct(Fields<'a>),
    /// Elements that are alike.
    Array(Array<'a>),
}

/// Elements that are alike.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    of: &'a FieldOf,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(fields: &'a [FieldOf], subsections: &'a [Group], bytes: &'a [u8]) -> Self {
        Self { fields, subsections, bytes }
    }

    /// Takes the first `length` bytes.
    fn take(&mut self, length: Option<u64>) -> &'a [u8] {
        let length = length.and_then(|length| usize::try_from(length).ok()).unwrap_or(usize::MAX);
        let (taken, rest) = self.bytes.split_at_checked(length).unwrap_or((self.bytes, &[]));
        self.bytes = rest;
        taken
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        if let Some((first, rest)) = self.fields.split_first() {
            self.fields = rest;
            return Some(Field { of: Part::Field(first), bytes: self.take(first.length()) });
        }
        let (first, rest) = self.subsections.split_first()?;
        self.subsections = rest;
        self.take(Some(first.head()));
        let mut inner = Fields::new(&first.fields, &first.subsections, self.bytes);
        // The length of a subsection is that of its parts.
        let before = inner.bytes.len();
        inner.by_ref().for_each(drop);
        let length = before - inner.bytes.len();
        Some(Field { of: Part::Subsection(first), bytes: self.take(Some(length as u64)) })
    }
}

impl<'a> Field<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        match self.of {
            Part::Field(field) => &field.name,
            Part::Subsection(group) => &group.vmsd_name,
        }
    }

    /// Its number, if it is one of several fields with this name that are not alike.
    pub fn index(&self) -> Option<u64> {
        match self.of {
            Part::Field(field) => field.index,
            Part::Subsection(_) => None,
        }
    }

    /// QEMU's name for its type, or `subsection`.
    pub fn kind(&self) -> &'a str {
        match self.of {
            Part::Field(field) => &field.kind,
            Part::Subsection(_) => "subsection",
        }
    }

    /// Its bytes, as in the stream.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What it contains.
    pub fn value(&self) -> Value<'a> {
        match self.of {
            Part::Field(field) if field.array_len.is_some() => {
                Value::Array(Array { of: field, bytes: self.bytes })
            }
            Part::Field(field) => value(field, self.bytes),
            Part::Subsection(group) => {
                Value::Struct(Fields::new(&group.fields, &group.subsections, self.bytes))
            }
        }
    }
}

impl<'a> Array<'a> {
    /// The number of its elements. Elements without bytes are not counted.
    pub fn len(&self) -> usize {
        let size = usize::try_from(self.of.size).unwrap_or(usize::MAX);
        self.bytes.len().checked_div(size).unwrap_or(0)
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element with this number.
    pub fn get(&self, number: usize) -> Option<Value<'a>> {
        let size = usize::try_from(self.of.size).ok().filter(|size| *size > 0)?;
        let start = number.checked_mul(size)?;
        Some(value(self.of, self.bytes.get(start..start.checked_add(size)?)?))
    }

    /// Its elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let array = *self;
        (0..array.len()).filter_map(move |number| array.get(number))
    }

    /// The element as a number.
    pub fn number(&self, number: usize) -> Option<u64> {
        self.get(number)?.as_number()
    }
}

impl Value<'_> {
    /// The value, if it is a number without a sign.
    pub fn as_number(&self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(*number),
            _ => None,
        }
    }
}

/// One element of a field.
fn value<'a>(of: &'a FieldOf, bytes: &'a [u8]) -> Value<'a> {
    if let Some(group) = &of.group {
        return Value::Struct(Fields::new(&group.fields, &group.subsections, bytes));
    }
    // "uint32 equal" is a number that must be equal on both sides.
    let kind = of.kind.split(' ').next().unwrap_or_default();
    let known = bytes.len() <= size_of::<u64>() && !bytes.is_empty();
    let unsigned = bytes.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    match kind {
        "bool" if bytes.len() == 1 => Value::Bool(unsigned != 0),
        kind if known && is_number(kind, "uint") => Value::Unsigned(unsigned),
        kind if known && (is_number(kind, "int") || kind == "timer") => {
            let unused = u64::BITS - 8 * u32::try_from(bytes.len()).unwrap_or(8);
            Value::Signed((unsigned << unused).cast_signed() >> unused)
        }
        _ => Value::Bytes(bytes),
    }
}

fn is_number(kind: &str, name: &str) -> bool {
    kind.strip_prefix(name).is_some_and(|bits| matches!(bits, "8" | "16" | "32" | "64"))
}
