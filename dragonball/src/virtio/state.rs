//! Saved states: postcard, a version in front, and nothing believed of what comes back.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::device::{DeviceError, SavedState};

/// No device's state is near this many bytes; a longer one is not ours.
const MAX_STATE_BYTES: usize = 1 << 20;

/// Packs `state` as format `version`.
pub(crate) fn encode(version: u16, state: &impl Serialize) -> Result<SavedState, DeviceError> {
    let data = postcard::to_stdvec(state)
        .map_err(|error| DeviceError::InvalidState(format!("it cannot be written: {error}")))?;
    Ok(SavedState { version, data })
}

/// Unpacks a state of format `version`; a caller still has to check the values in it.
pub(crate) fn decode<T: DeserializeOwned>(version: u16, saved: &SavedState) -> Result<T, DeviceError> {
    if saved.version != version {
        return Err(DeviceError::InvalidState(format!(
            "its format is version {}, this device reads version {version}; save it again with this version",
            saved.version
        )));
    }
    if saved.data.len() > MAX_STATE_BYTES {
        return Err(DeviceError::InvalidState(format!(
            "it has {} bytes, at most {MAX_STATE_BYTES} are possible",
            saved.data.len()
        )));
    }
    match postcard::take_from_bytes(&saved.data) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(DeviceError::InvalidState(format!("{} bytes follow its end", rest.len()))),
        Err(error) => Err(DeviceError::InvalidState(format!("it cannot be read: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_was_saved() {
        let saved = encode(3, &(7_u16, vec![1_u8, 2])).unwrap();
        assert_eq!(decode::<(u16, Vec<u8>)>(3, &saved).unwrap(), (7, vec![1, 2]));
    }

    #[test]
    fn another_version_a_cut_a_tail_and_an_endless_state_are_refused() {
        let good = encode(1, &(7_u16, 9_u32)).unwrap();
        let mut tail = good.clone();
        tail.data.push(0);
        let cut = SavedState { version: 1, data: good.data[..1].to_vec() };
        let endless = SavedState { version: 1, data: vec![0; MAX_STATE_BYTES + 1] };
        let other = SavedState { version: 2, ..good };
        for bad in [tail, cut, endless, other] {
            assert!(matches!(decode::<(u16, u32)>(1, &bad), Err(DeviceError::InvalidState(_))));
        }
    }
}
