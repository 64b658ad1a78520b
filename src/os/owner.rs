//! Which user a file belongs to.

use nix::unistd::Uid;

use crate::error::ErrorKind;

/// Which user's file is accepted as a table. The owner of the file can forge generations.
///
/// In a user namespace, all users that are not mapped into it show as one (65534, "nobody"). Unless a user with that number is
/// mapped into it, only [`Anyone`](Self::Anyone) accepts that one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnerCheck {
    /// The effective user of this process, or root.
    #[default]
    CurrentUserOrRoot,
    /// The user with this id.
    User(u32),
    /// No check.
    Anyone,
}

impl OwnerCheck {
    pub(crate) fn check(self, found: u32) -> Result<(), ErrorKind> {
        let user = Uid::effective().as_raw();
        let (accepted, mut expected) = match self {
            Self::CurrentUserOrRoot => (found == user || found == 0, format!("{user} (this process's user) or 0")),
            Self::User(user) => (found == user, user.to_string()),
            Self::Anyone => return Ok(()),
        };
        let unmapped = check_mapped(found);
        if let Err(unmapped) = &unmapped {
            expected = format!("{expected}, and not {unmapped}");
        }
        if accepted && unmapped.is_ok() { Ok(()) } else { Err(ErrorKind::WrongOwner { found, expected }) }
    }
}

/// Checks that a file that shows as `user`'s really is that user's: in a user namespace, all users that are not mapped into it
/// show as one, which the error names. If the namespace's map cannot be read, that one is taken to be unmapped.
pub(crate) fn check_mapped(user: u32) -> Result<(), String> {
    // If /proc hides the number, it is 65534, unless an administrator has changed it.
    let overflow = std::fs::read_to_string("/proc/sys/kernel/overflowuid");
    let overflow = overflow.ok().and_then(|number| number.trim().parse().ok()).unwrap_or(65_534);
    if user != overflow {
        return Ok(());
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_mapped = map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
        let (first, _outside, count) = (numbers.next(), numbers.next(), numbers.next());
        let (first, user) = (first.unwrap_or(0), u64::from(user));
        (first..first.saturating_add(count.unwrap_or(0))).contains(&user)
    });
    if is_mapped {
        Ok(())
    } else {
        Err(format!("{user}, which stands for all users that are not mapped into this user namespace"))
    }
}
