//! Protobuf's wire format, as far as walking over a message's fields needs it.

pub enum Field<'a> {
    Varint(u64),
    Fixed64(u64),
    /// Nobody asked for its value yet.
    Fixed32,
    Bytes(&'a [u8]),
}

/// The next field's number and value. `None` when malformed, or of a kind that proto3 has no use for.
pub fn field<'a>(data: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let tag = varint(data)?;
    let value = match tag & 7 {
        0 => Field::Varint(varint(data)?),
        1 => Field::Fixed64(u64::from_le_bytes(take(data, 8)?.try_into().ok()?)),
        2 => {
            let size = usize::try_from(varint(data)?).ok()?;
            Field::Bytes(take(data, size)?)
        }
        5 => {
            take(data, 4)?;
            Field::Fixed32
        }
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn take<'a>(data: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let (head, rest) = data.split_at_checked(size)?;
    *data = rest;
    Some(head)
}

fn varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for i in 0..10 {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Many times the bytes, each time with three of them changed: what readers must survive.
#[cfg(test)]
pub fn mutations(data: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..20_000).map(move |_| {
        let mut changed = data.to_vec();
        for _ in 0..3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = (state >> 8) as usize % changed.len();
            changed[at] = state as u8;
        }
        changed
    })
}
