//! Which boot of the machine this is.

use nix::errno::Errno;

use crate::error::Error;

/// The kernel's id of this boot; zero if the kernel does not provide one.
///
/// # Errors
///
/// It could not be read, for lack of descriptors or memory.
pub(crate) fn boot_id() -> Result<[u64; 2], Error> {
    let id = match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Err(error)
            if matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
            ) =>
        {
            return Err(Error::io("asking the system for its boot id", &error));
        }
        id => id.unwrap_or_default(),
    };
    let number = u128::from_str_radix(&id.trim().replace('-', ""), 16).unwrap_or(0);
    Ok([(number >> 64) as u64, number as u64])
}
